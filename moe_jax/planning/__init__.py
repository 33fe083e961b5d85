"""The cost of a run before it starts: parameters, FLOPs, memory, communication, hardware."""
