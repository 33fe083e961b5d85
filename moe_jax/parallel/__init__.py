"""Many devices: the mesh, the mesh axes of array dims, and the processes of a run.

A mesh has five axes, outermost first: `slice` (data-centre network), `data`, `fsdp`, `expert`,
`tensor`. Array dims have the names of the model ("batch", "expert", "hidden"), and one table,
`rules.RULES`, maps each name to mesh axes. Programs are written for whole arrays and compiled by
`jax.jit` for the mesh in use (`jax.set_mesh`), with `constrain` where the compiler should not
choose a sharding. Without a mesh, all of this does nothing.
"""
