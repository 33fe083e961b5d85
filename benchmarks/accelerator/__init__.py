"""One prepared run for a machine with a GPU or TPU: `python -m benchmarks.accelerator`.

`__main__` reads the flags, `supervisor` starts a process for each group of rows, `child` is that
process, `record` the file that they write. A group is a module with `rows(dry)`; `groups` lists
the groups in order of value. `page` makes docs/accelerators.md from a record.
"""
