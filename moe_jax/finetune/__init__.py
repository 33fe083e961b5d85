"""Starts from a model that exists: dense to sparse and back, and what training on needs of it."""
