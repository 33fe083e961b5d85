"""Weights of other systems, read and written: Hugging Face's layout, and GGUF.

A family of models is a table in `families`: its settings, and the names of its tensors.
"""
