"""Which kernel computes attention, and the way to it (legend: `moe_jax.moe`; T counts keys).

  xla     products and a softmax as XLA compiles them: everything, everywhere. Writes the scores,
          [B, N, L, T] in float32.
  splash  Pallas kernel of a TPU: no scores in memory, and no work on blocks that no query sees.

Kernels want rules about places in the row, and documents by number. No mask is made for them.
"""

import functools
import logging
from typing import NamedTuple

import jax

from moe_jax.config.check import require
from moe_jax.layers.dot_product import attend
from moe_jax.layers.masks import Rules, Tokens, by_place, visible
from moe_jax.parallel.rules import mesh_in_use, partition_spec, platform

logger = logging.getLogger(__name__)

KERNELS = ("auto", "xla", "splash")
BEST = {"tpu": "splash"}  # that "auto" takes, by platform
RESIDUALS = "attention_residuals"  # name, for remat, of a kernel's output and log-sums


class Machine(NamedTuple):
    """What a program is compiled for.

    Attributes:
      platform: "cpu", "tpu" or "gpu".
      manual: whether the call is inside `jax.shard_map`.
    """

    platform: str
    manual: bool = False


class Task(NamedTuple):
    """What attention asks of a kernel.

    Attributes:
      counts_up: see `Call`.
      rules: which keys a query sees.
      bias: whether scores have one.
    """

    counts_up: bool
    rules: Rules
    bias: bool = False


class Choice(NamedTuple):
    """A kernel.

    Attributes:
      kernel: its name.
      lacks: what the platform's best kernel cannot do, if it is not that; else "".
    """

    kernel: str
    lacks: str = ""


def lacking(kernel: str, task: Task, machine: Machine) -> str:
    """What a kernel cannot do of a task on a machine, in words; "" if it can do it.

    On a CPU, splash runs in the interpreter of Pallas: for tests, since it is slow.
    """
    if kernel == "xla":
        return ""
    if kernel == "splash" and machine.platform == "gpu":
        return "it runs on a TPU, here on a GPU"
    if machine.manual:
        return "it cannot run inside jax.shard_map"
    if task.bias:
        return "it adds no position bias to scores"
    by_position = task.rules != Rules(causal=False)
    if by_position and not task.counts_up:
        return "it needs positions that count up (Call.counts_up)"
    return ""


def choose(kernel: str, task: Task, machine: Machine) -> Choice:
    """The kernel for a task on a machine.

    Args:
      kernel: of `KERNELS`; "auto": the best of the platform, or xla where that cannot do the task.
      task: what is asked of it.
      machine: what it runs on.

    Raises:
      ValueError: a kernel asked for by name cannot do the task.
    """
    if kernel == "auto":
        best = BEST.get(machine.platform, "xla")
        lacks = lacking(best, task, machine)
        return Choice("xla", f"{best}: {lacks}") if lacks else Choice(best)
    lacks = lacking(kernel, task, machine)
    require(
        not lacks,
        "the kernel of attention must be able to do what is asked of it",
        f"kernel={kernel!r}: {lacks}",
        "Set kernel='auto' or 'xla'",
    )
    return Choice(kernel)


def chosen(kernel: str, task: Task) -> str:
    """The kernel for a task here; says so once where "auto" must take xla on an accelerator."""
    mesh = jax.sharding.get_abstract_mesh()
    choice = choose(kernel, task, Machine(platform(), bool(mesh.manual_axes)))
    if choice.lacks:
        warn_of(choice)
    return choice.kernel


@functools.cache
def warn_of(choice: Choice) -> None:
    """Logs, once, that attention writes its scores to memory."""
    logger.warning(
        "Attention takes the kernel %r, whose memory grows with the square of the length (%s).",
        choice.kernel,
        choice.lacks,
    )


def attend_by_rules(
    q_BLND: jax.Array,
    k_BTKD: jax.Array,
    v_BTKV: jax.Array,
    rules: Rules,
    queries: Tokens,
    keys: Tokens | None = None,
    *,
    kernel: str,
    counts_up: bool,
    scale: float,
    bias_BNLT: jax.Array | None = None,
    softcap: float | None = None,
    sink_N: jax.Array | None = None,
) -> jax.Array:
    """`attend`, of the keys that keep to rules, by the kernel for it.

    Args:
      q_BLND: queries.
      k_BTKD: keys.
      v_BTKV: values, whose dim may differ from that of the keys.
      rules: which keys of its own document a query sees.
      queries: where they stand.
      keys: where they stand; None: the queries' own. A query that sees none gets a mean of some.
      kernel: of `KERNELS`.
      counts_up: whether positions do; see `Call`.
      scale: see `attend`.
      bias_BNLT: see `attend`.
      softcap: see `attend`.
      sink_N: see `attend`.

    Returns:
      [B, L, N, V] in the dtype of the values. Padding gets finite numbers.

    Raises:
      ValueError: the kernel asked for cannot do it.
    """
    task = Task(counts_up, rules, bias_BNLT is not None)
    if chosen(kernel, task) == "xla":
        return attend(
            q_BLND, k_BTKD, v_BTKV, visible(rules, queries, keys),
            scale=scale, bias_BNLT=bias_BNLT, softcap=softcap, sink_N=sink_N,
        )  # fmt: skip
    from moe_jax.layers.splash import splash  # imports Pallas, which takes half a second

    rules, documents_BL = by_place(rules, queries)
    key_documents_BT = documents_BL if keys is None else keys.segments_BL
    run = functools.partial(
        splash, rules=rules, scale=scale, softcap=softcap, interpret=platform() == "cpu"
    )
    mesh = mesh_in_use()
    if mesh is not None:
        heads = partition_spec(("batch", None, "heads", None), mesh)
        tokens = partition_spec(("batch", None), mesh)
        of_heads = partition_spec(("heads",), mesh)
        # Unchecked, since kernels do not say what differs between devices. All but sinks is split;
        # the gradient of sinks is summed over the devices that have copies.
        run = jax.shard_map(
            run, mesh=mesh, in_specs=(heads, heads, heads, tokens, tokens, of_heads),
            out_specs=heads, check_vma=False,
        )  # fmt: skip
    out_BLNV: jax.Array = run(q_BLND, k_BTKD, v_BTKV, documents_BL, key_documents_BT, sink_N)
    return out_BLNV
