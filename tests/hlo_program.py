"""Programs for the tests of `moe_jax.planning.hlo`: written by hand, compiled here, or stored."""

import pathlib
import textwrap

import jax
import jax.numpy as jnp

from moe_jax.planning.hlo import read_program

TEXTS = pathlib.Path(__file__).parent / "hlo"
ADD = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""


def program(entry, *, other="", num_devices=8):
    """Reads a module from the instructions of its entry and the text of other computations."""
    header = f"HloModule m, is_scheduled=true, num_partitions={num_devices}"
    lines = textwrap.indent(textwrap.dedent(entry).strip(), "  ")
    return read_program(f"{header}\n{ADD}\n{other}\nENTRY %main () -> f32[] {{\n{lines}\n}}\n")


def compiled(function, *shapes):
    """Compiles for the CPU that the tests run on."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile()


def kept(name):
    """Reads a program that `tests/hlo/make_programs.py` compiled for another machine."""
    return read_program((TEXTS / f"{name}.txt").read_text())
