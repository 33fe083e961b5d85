"""Models made of parts: layers, stacks, the language model, Linen and NNX shells."""
