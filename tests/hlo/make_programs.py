"""Programs compiled for absent machines, as text for `tests/test_planning_hlo.py`.

    python -m tests.hlo.make_programs v5e:2x4
    python -m tests.hlo.make_programs h100:8

write `tests/hlo/*.txt` anew, with that platform's compiler installed (see
`moe_jax.planning.topology`). Most of the text is left out: the compiler's tuning notes, positions
in source files, and most names. Everything that decides the counts stays.
"""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.planning.topology import devices, parse_topology

HERE = pathlib.Path(__file__).parent
NUM_LAYERS, DIM, HIDDEN, TOKENS = 3, 1024, 4096, 8192
EXPERTS, WIDTH, ROWS = 4, 768, 1024
BATCHES = (3, 5)
KEPT_NOTES = (
    r'"known_trip_count":\{"n":"\d+"\}',
    r'"async_collective_fusion_config":\{[^}]*\}',
    r'"kind":"__\w+"',
)
# Opcodes that keep their origin in the traced program.
NAMED = r"(all-|reduce-scatter|collective-|ragged-|while|custom-call|fusion)\S*\("


def layers(weights, x):
    """One step of gradient descent on a scan of residual MLPs, with sharded weights and tokens."""

    def loss(weights):
        def layer(x, w):
            with jax.named_scope("layer"):
                return x + jax.nn.relu(x @ w[0]) @ w[1], None

        return (jax.lax.scan(layer, x, weights)[0].astype(jnp.float32) ** 2).mean()

    return jax.tree.map(lambda w, g: (w - g).astype(w.dtype), weights, jax.grad(loss)(weights))


def exchange(x, experts, sizes):
    """Every collective once, and a grouped matmul, on the shard of one device."""
    shifted = jax.lax.ppermute(x, "model", [(i, (i + 1) % 4) for i in range(4)])
    starts = jnp.arange(4, dtype=jnp.int32) * (ROWS // 4)
    lengths = jnp.full(4, ROWS // 4, jnp.int32)
    rows = jax.lax.ragged_all_to_all(
        shifted, jnp.zeros_like(x), starts, lengths, starts, lengths, axis_name="model"
    )
    out = jax.lax.ragged_dot(rows, experts, sizes)
    out = jax.lax.all_to_all(jnp.tanh(out), "model", 0, 0, tiled=True)
    part = jax.lax.psum_scatter(jnp.tanh(out), "model", tiled=True)
    whole = jax.lax.all_gather(part * 2, "data", tiled=True)
    return jax.lax.psum(jnp.tanh(whole), "data")


def einsum(a, b):
    """A matmul with two batch dims, in another order on each side."""
    return jnp.einsum("abij,bajk->abik", a, b)


def compile_texts(topology: str) -> dict[str, str]:
    """The text of each program, by name."""
    mesh = Mesh(np.array(devices(parse_topology(topology))).reshape(2, 4), ("data", "model"))

    def array(shape, *axes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    weights = (
        array((NUM_LAYERS, DIM, HIDDEN), None, "model"),
        array((NUM_LAYERS, HIDDEN, DIM), None, None, "model"),
    )
    sharded = jax.jit(
        layers, out_shardings=jax.tree.map(lambda w: w.sharding, weights), donate_argnums=0
    )
    local = jax.shard_map(
        exchange,
        mesh=mesh,
        in_specs=(P(("data", "model")), P(), P()),
        out_specs=P("model"),
        check_vma=False,
    )
    a, b = BATCHES
    programs = {
        "layers": sharded.lower(weights, array((TOKENS, DIM), "model")),
        "exchange": jax.jit(local).lower(
            array((8 * ROWS, DIM), ("data", "model")),
            array((EXPERTS, DIM, WIDTH)),
            array((EXPERTS,), dtype=jnp.int32),
        ),
        "einsum": jax.jit(einsum).lower(array((a, b, 256, 128)), array((b, a, 128, 384))),
    }
    return {name: shorten(lowered.compile().as_text()) for name, lowered in programs.items()}


def shorten(text: str) -> str:
    """The module without tables of source positions, and with only `KEPT_NOTES` of the backend."""
    header, body = text.split("\n", 1)
    body = body[re.search(r"^(%|ENTRY)", body, re.MULTILINE).start() :]
    body = re.sub(r"(?m), backend_config=(.*)$", _notes, body)
    body = re.sub(r' (stack_frame_id=\d+|scheduling_name="[^"]*")', "", body)
    body = re.sub(rf"(?m)^((?!.* ({NAMED})).*), metadata=\{{[^}}]*\}}", r"\1", body)
    return f"{header}\n\n{body.rstrip()}\n"


def _notes(match: re.Match) -> str:
    kept = [note[0] for kind in KEPT_NOTES if (note := re.search(kind, match[1]))]
    return f", backend_config={{{','.join(kept)}}}" if kept else ""


if __name__ == "__main__":
    for name, text in compile_texts(sys.argv[1]).items():
        (HERE / f"{sys.argv[1].split(':')[0]}_{name}.txt").write_text(text)
