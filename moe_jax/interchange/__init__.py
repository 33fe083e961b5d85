"""Reads and writes weights in Hugging Face layout and GGUF, and writes PEFT adapters.

A family of models is a table in `families`: its settings and tensor names.
"""
