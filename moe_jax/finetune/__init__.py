"""Makes new models from trained ones: dense to sparse and back, and distillation."""
