"""Arithmetic about a model before it runs: parameters, FLOPs, rates of hardware."""
