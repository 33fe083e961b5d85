"""Models made of parts: layers, stacks, the language model, its Linen and NNX shells."""
