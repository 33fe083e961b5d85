"""Mixture-of-experts language models in JAX and Flax, for research on TPUs and GPUs."""
