"""Many devices: the mesh, the axes that array dims lie on, and the processes of a run.

A mesh has five axes, outermost first: `slice` (data-centre network), `data`, `fsdp`, `expert`,
`tensor`. Arrays name their dims in the terms of the model ("batch", "expert", "hidden"), and one
table, `rules.RULES`, gives each name its mesh axes. Programs are written for whole arrays and
compiled by `jax.jit` for the mesh in use (`jax.set_mesh`), with `constrain` where the compiler
should not choose by itself. Without a mesh all of this does nothing.
"""
