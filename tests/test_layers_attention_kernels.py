"""The choice of attention kernel, and the Pallas kernels against a float64 reference.

They run in Pallas's interpreter, so the accelerator's code runs with the CPU's arithmetic.
"""

import dataclasses
import functools
import itertools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MeshConfig
from moe_jax.layers import attention_kernels, splash
from moe_jax.layers.attention import Attention
from moe_jax.layers.attention_kernels import (
    Machine,
    Task,
    attend_by_rules,
    choose,
    chosen,
    keeps_attention,
)
from moe_jax.layers.cross_attention import CrossAttention
from moe_jax.layers.latent_attention import LatentAttention
from moe_jax.layers.masks import Rules, Tokens
from moe_jax.models.stack import REMAT
from moe_jax.parallel.mesh import make_mesh
from moe_jax.part import Call, Dims, EncoderInputs, Own
from tests.slow import slow_but
from tests.tiny_run import quick_jit

# Sums of up to 256 products of numbers near 1 in float32; gradients up to 20.
FLOAT32 = 1e-5

CAUSAL, BOTH = Rules(causal=True), Rules(causal=False)
PLAIN = Task(CAUSAL, (128, 128), "bfloat16", lengths=(256, 256))
CPU, TPU = map(Machine, ("cpu", "tpu"))
GPU = Machine("gpu", cudnn=92800, largest_dim=256)


@pytest.mark.parametrize(
    ("kernel", "task", "machine", "expected"),
    [
        ("auto", PLAIN, CPU, "blocks"),
        ("auto", PLAIN._replace(contiguous=False), CPU, "blocks"),
        ("auto", PLAIN._replace(bias=True), CPU, "xla"),
        ("auto", PLAIN._replace(own_keys=False), CPU, "xla"),
        ("blocks", PLAIN, GPU, "blocks"),
        ("auto", PLAIN, TPU, "splash"),
        ("auto", PLAIN._replace(rules=Rules(True, window=4, chunk=8)), TPU, "splash"),
        ("auto", PLAIN._replace(rules=BOTH), TPU, "splash"),
        # Positions need not count up if no rule reads them: an encoder, cross-attention.
        ("auto", PLAIN._replace(contiguous=False, rules=BOTH), TPU, "splash"),
        ("auto", PLAIN._replace(contiguous=False), TPU, "xla"),
        (
            "auto",
            PLAIN._replace(contiguous=False, rules=Rules(False, window=4)),
            TPU,
            "xla",
        ),
        ("auto", PLAIN._replace(dims=(192, 128), dtype="float32", sink=True), TPU, "splash"),
        ("auto", PLAIN._replace(bias=True), TPU, "xla"),
        ("auto", PLAIN._replace(own_keys=False), TPU, "xla"),
        ("auto", PLAIN._replace(own_keys=False, rules=BOTH), TPU, "splash"),
        ("auto", PLAIN, TPU._replace(manual=True), "xla"),
        ("auto", PLAIN._replace(learned_keys=True), CPU, "xla"),
        ("auto", PLAIN._replace(in_prefix=True), TPU, "xla"),
        ("xla", PLAIN, TPU, "xla"),
        ("splash", PLAIN, CPU, "splash"),
        ("triton", PLAIN, CPU, "triton"),
        ("triton", PLAIN._replace(sink=True, softcap=True, dtype="float32"), GPU, "triton"),
        ("auto", PLAIN, GPU, "cudnn"),
        ("auto", PLAIN, GPU._replace(cudnn=None), "cudnn"),  # only planned here
        ("auto", PLAIN, GPU._replace(cudnn=0), "xla"),
        # cuDNN reads a mask, so positions need not count up.
        (
            "auto",
            PLAIN._replace(contiguous=False, rules=Rules(False, chunk=4)),
            GPU,
            "cudnn",
        ),
        ("auto", PLAIN._replace(dims=(192, 128)), GPU, "cudnn"),
        ("auto", PLAIN._replace(dims=(192, 128)), GPU._replace(largest_dim=128), "xla"),
        ("auto", PLAIN._replace(dims=(64, 128)), GPU, "xla"),
        ("auto", PLAIN._replace(dims=(60, 60)), GPU, "xla"),
        ("auto", PLAIN._replace(dtype="float32"), GPU, "xla"),
        ("auto", PLAIN._replace(lengths=(255, 255)), GPU, "xla"),
        ("auto", PLAIN._replace(softcap=True), GPU, "xla"),
        ("auto", PLAIN._replace(sink=True), GPU, "xla"),
        ("auto", PLAIN._replace(bias=True), GPU, "xla"),
    ],
)
def test_the_kernel_that_is_chosen(kernel, task, machine, expected):
    choice = choose(kernel, task, machine)
    assert choice.kernel == expected
    forced = kernel == "auto" and machine.platform != "cpu" and expected == "xla"
    if machine.platform != "cpu":
        assert bool(choice.lacks) == forced, "what the best kernel lacks is said"


@pytest.mark.parametrize(
    ("kernel", "task", "machine", "message"),
    [
        ("splash", PLAIN, GPU, "splash': it runs on a TPU"),
        ("splash", PLAIN._replace(bias=True), TPU, "splash': it adds no position bias"),
        ("blocks", PLAIN._replace(learned_keys=True), CPU, "blocks': .*without a learned prefix"),
        ("triton", PLAIN, TPU, "triton': it runs on a GPU, here on a TPU"),
        (
            "triton",
            PLAIN._replace(contiguous=False),
            GPU,
            r"triton': .*Call\.contiguous",
        ),
        ("cudnn", PLAIN, TPU, "cudnn': it runs on a GPU, here on a TPU"),
        ("cudnn", PLAIN._replace(dtype="float32"), GPU, "in bfloat16 or float16, here in float32"),
        (
            "splash",
            PLAIN._replace(own_keys=False),
            TPU,
            "splash': it knows no positions of a cache",
        ),
        (
            "splash",
            PLAIN._replace(contiguous=False),
            TPU,
            r"splash': .*Call\.contiguous",
        ),
        ("splash", PLAIN, TPU._replace(manual=True), "splash': .*inside jax.shard_map"),
    ],
)
def test_a_kernel_asked_for_by_name_does_it_or_says_what_it_cannot(kernel, task, machine, message):
    with pytest.raises(ValueError, match=message):
        choose(kernel, task, machine)


def compiled_for(platform):
    """A context that compiles programs for another platform."""
    device = jax.sharding.AbstractDevice("planned", None, platform)
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    )


def test_an_accelerator_says_once_that_memory_is_quadratic(caplog):
    attention_kernels.warn_of.cache_clear()
    task = PLAIN._replace(bias=True)
    with compiled_for("tpu"), caplog.at_level(logging.WARNING):
        assert [chosen("auto", task) for _ in range(2)] == ["xla", "xla"]
    assert chosen("auto", task) == "xla", "on a CPU there is nothing to say"
    (said,) = caplog.messages
    assert "square of the length (splash: it adds no position bias" in said


class Case(NamedTuple):
    """Attention over two rows of documents and padding: its rules, heads and dims."""

    rules: Rules
    softcap: float | None = None
    sink: bool = False
    heads: int = 4
    kv_heads: int = 2
    dim: int = 8
    value_dim: int = 8
    length: int = 128
    dtype: str = "float32"


CASES = {
    "grouped, sinks": Case(CAUSAL, sink=True),
    "no whole block": Case(CAUSAL, length=200),
    "several blocks": Case(Rules(True, window=60), sink=True, length=384),
    "encoder": Case(BOTH, kv_heads=4, length=200),
    "window": Case(Rules(True, window=9)),
    "window of an encoder": Case(Rules(False, window=9), softcap=2.0),
    "chunk": Case(Rules(True, chunk=24), length=256),
    "chunk of an encoder": Case(Rules(False, chunk=24)),
    "window and chunk": Case(Rules(True, window=9, chunk=24)),
    "cap": Case(CAUSAL, softcap=1.0),
    "cap and sinks, one key head": Case(CAUSAL, softcap=1.0, sink=True, kv_heads=1),
    "latent": Case(CAUSAL, kv_heads=4, dim=192, value_dim=128),
    "64": Case(CAUSAL, dim=64, value_dim=64, length=256),
}


def documents(length):
    """Segments and positions: two packed documents, then padding; one document between padding."""
    first, second = length // 3, length // 2
    segments = np.zeros((2, length), np.int32)
    positions = np.zeros((2, length), np.int32)
    for row, number, start, stop in (
        (0, 1, 0, first), (0, 2, first, first + second), (1, 1, 17, length - 13),
    ):  # fmt: skip
        segments[row, start:stop], positions[row, start:stop] = number, np.arange(stop - start)
    return segments, positions


def seen_by_hand(rules, segments, positions):
    """The mask of seen keys, worked out query by query."""
    seen = np.zeros((*segments.shape, segments.shape[1]), bool)
    for row, i, j in np.argwhere(segments[:, :, None] == segments[:, None, :]):
        x, y = int(positions[row, i]), int(positions[row, j])
        seen[row, i, j] = segments[row, i] > 0 and (
            (y <= x or not rules.causal)
            and (rules.window is None or abs(x - y) < rules.window)
            and (rules.chunk is None or x // rules.chunk == y // rules.chunk)
        )
    return seen


def dense(q, k, v, sink, seen, case, scale):
    """The definition of attention, head by head, in float64. A query that sees no key gives 0."""
    heads = []
    for n in range(case.heads):
        own = n // (case.heads // case.kv_heads)
        scores = scale * q[:, :, n] @ jnp.swapaxes(k[:, :, own], 1, 2)
        scores = scores if case.softcap is None else case.softcap * jnp.tanh(scores / case.softcap)
        weights = jnp.where(seen, jnp.exp(scores), 0)
        total = weights.sum(-1, keepdims=True) + (jnp.exp(sink[n]) if case.sink else 0)
        heads.append(weights / jnp.where(total == 0, 1, total) @ v[:, :, own])
    return jnp.stack(heads, 2)


@functools.cache
def compared(name, kernel):
    """Largest differences from the reference, and its largest entries, for output and gradients."""
    case, random = CASES[name], np.random.default_rng(0)
    segments, positions = documents(case.length)
    shapes = [(case.heads, case.dim), (case.kv_heads, case.dim), (case.kv_heads, case.value_dim)]
    arrays = [random.normal(size=(2, case.length, *shape)) for shape in shapes]
    arrays.append(random.normal(size=case.heads))
    weights = random.normal(size=(2, case.length, case.heads, case.value_dim))
    weights *= (segments > 0)[..., None, None]
    scale = case.dim**-0.5

    def by_kernel(q, k, v, sink):
        y = attend_by_rules(
            q, k, v, case.rules, Tokens(jnp.asarray(positions), jnp.asarray(segments)),
            kernel=kernel, contiguous=True, scale=scale, softcap=case.softcap,
            sink_N=sink if case.sink else None,
        )  # fmt: skip
        return jnp.sum(y * weights.astype(np.float32)), y

    def by_definition(q, k, v, sink):
        y = dense(q, k, v, sink, seen_by_hand(case.rules, segments, positions), case, scale)
        return jnp.sum(y * weights), y

    gradients = functools.partial(jax.grad, argnums=(0, 1, 2, 3), has_aux=True)
    got = quick_jit(gradients(by_kernel))(*(jnp.asarray(x, jnp.float32) for x in arrays))
    with jax.enable_x64():
        expected = quick_jit(gradients(by_definition))(*map(jnp.asarray, arrays))
        expected = jax.tree.map(np.asarray, expected)
    assert np.isfinite(got[1]).all(), "padding too"
    real = (segments > 0)[..., None, None]
    pairs = [*zip(got[0], expected[0], strict=True), (got[1] * real, expected[1] * real)]
    return [(np.abs(a - b).max(), np.abs(b).max()) for a, b in pairs]


PALLAS = ("splash", "triton")
QUICK = [*(("grouped, sinks", kernel) for kernel in PALLAS), ("several blocks", "blocks")]


@pytest.mark.parametrize(
    ("name", "kernel"), slow_but(QUICK, list(itertools.product(CASES, ("blocks", *PALLAS))))
)
def test_a_kernel_is_attention(name, kernel):
    """The output, and the gradients of queries, keys, values and sinks."""
    for difference, largest in compared(name, kernel):
        assert difference <= FLOAT32 * max(largest, 1)
        assert largest > 0.1 or not CASES[name].sink


FAULTS = {
    "window": (
        "mask_of",
        lambda rules, *shape: splash.masks.LocalMask(shape, (rules.window, 0), 0),
    ),
    "chunk": ("filled", lambda x, block, value: jnp.zeros_like(x) if x.ndim == 2 else x),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen(name, monkeypatch):
    """Planted faults: a window one key too wide; documents that are not separated."""
    monkeypatch.setattr(splash, *FAULTS[name])
    compared.cache_clear()
    with pytest.raises(AssertionError):
        test_a_kernel_is_attention(name, "splash")
    compared.cache_clear()


MODEL_DIM, LENGTH = 8, 128
PARTS = {
    "attention": Attention(num_heads=4, num_kv_heads=2, head_dim=4, sink=True, chunk=40),
    "latent": LatentAttention(num_heads=4, kv_rank=4, nope_dim=4, rope_dim=2, value_dim=6),
    "cross": CrossAttention(num_heads=4, num_kv_heads=2, head_dim=4),
}


def of_part(part, *, causal=True, mesh=None):
    """Output and gradients of two scanned layers with rematerialisation."""
    random = np.random.default_rng(0)
    segments, positions = documents(LENGTH)
    segments, positions = (np.concatenate([x, x]) for x in (segments, positions))
    params = jax.tree.map(
        lambda spec: jnp.asarray(random.normal(size=(2, *spec.shape)) / 3, jnp.float32),
        part.specs(Dims(MODEL_DIM)),
    )
    x = jnp.asarray(random.normal(size=(4, LENGTH, MODEL_DIM)), jnp.float32)
    memory = jnp.asarray(random.normal(size=(4, 70, MODEL_DIM)), jnp.float32)
    call = Call(
        positions, segments, causal=causal, contiguous=True, memory=memory,
        memory_segments_BT=segments[:, ::-1][:, :70],
    )  # fmt: skip
    real = (segments > 0)[..., None]

    @jax.checkpoint
    def layer(x, params):
        return x + part.apply(params, x, call, Own())[0]

    def loss(params, x):
        y, _ = jax.lax.scan(lambda x, one: (layer(x, one), None), x, params)
        return jnp.mean(jnp.sin(y) * real), y * real

    run = quick_jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    if mesh is None:
        return run(params, x)
    with jax.set_mesh(mesh):
        return run(params, x)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("kernel", PALLAS)
@pytest.mark.parametrize("name", PARTS)
def test_a_part_gives_the_same_by_a_kernel(name, kernel, devices):
    """On one device, and on a mesh that splits the batch and the heads."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)) if devices == 8 else None
    part = PARTS[name]
    got, expected = (
        of_part(dataclasses.replace(part, kernel=one), mesh=mesh) for one in (kernel, "xla")
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=FLOAT32, atol=FLOAT32 * np.abs(b).max())
        assert np.abs(b).max() > 1e-6


def test_which_calls_have_positions_that_count_up():
    """Positions count up if none are given, or if the call declares it."""
    x, positions = jnp.zeros((1, 3, 1)), jnp.zeros((1, 3), jnp.int32)
    given, none = EncoderInputs(positions, positions), EncoderInputs(positions)
    for call, expected in (
        (Call(), True),
        (Call(segments_BL=positions), True),
        (Call(encoder=none), True),
        (Call(positions), False),
        (Call(encoder=given), False),
        (Call(positions, contiguous=True), True),
        (Call(positions, contiguous=True, encoder=given), True),
    ):
        assert call.with_defaults(x).contiguous is expected


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_part_is_resolved_for_the_machine_that_is_planned(part):
    on_cpu = "xla" if isinstance(part, CrossAttention) else "blocks"
    assert part.resolved("bfloat16").kernel == on_cpu
    with compiled_for("tpu"):
        assert part.resolved("float32").kernel == "splash"
        assert dataclasses.replace(part, kernel="xla").resolved("float32").kernel == "xla"
        with pytest.raises(ValueError, match="cudnn': it runs on a GPU, here on a TPU"):
            dataclasses.replace(part, kernel="cudnn").resolved("bfloat16")


def scores(part, kernel, length=256):
    """The cost of attention scores and weighted values in bfloat16."""
    return dataclasses.replace(part, kernel=kernel).costs(Dims(64), length, "bfloat16")[1]


def test_a_kernel_keeps_no_scores():
    """Costs per token, by hand: four query heads of 32, two key-value heads."""
    part = Attention(num_heads=4, num_kv_heads=2, head_dim=32)
    xla, splash, cudnn = (scores(part, kernel) for kernel in ("xla", "splash", "cudnn"))
    assert xla == scores(part, "auto")
    assert xla.flops == splash.flops == cudnn.flops == 2 * 2 * 256 * 4 * 32, "the whole square"
    assert xla.saved.split == 256 * 4 * (4 + 2) and xla.batched and not splash.batched
    # Per head, one log-sum in float32. With remat "dots", the output too.
    assert splash.saved == (0, 4 * 4) and splash.saved_dots == (0, 4 * 32 * 2 + 4 * 4)
    # Queries and output for four heads, keys and values for two.
    assert splash.traffic == (0, (2 * 4 + 2 * 2) * 32 * 2)
    assert scores(part, "splash", 512).traffic == splash.traffic, "whatever the length"
    assert splash == scores(part, "triton")
    # One row of the mask, shared by all heads.
    assert cudnn.traffic == (256 * 2, splash.traffic.split)
    latent = LatentAttention(num_heads=4, nope_dim=32, rope_dim=16, value_dim=32)
    assert scores(latent, "splash").traffic.split == 2 * 4 * (48 + 32) * 2
    cross = CrossAttention(num_heads=4, head_dim=32)
    costs = dataclasses.replace(cross, kernel="splash").costs(Dims(64, 0, 128), 256, "bfloat16")
    assert costs[1].traffic.split == (1 + 128 / 256) * 2 * 4 * 32 * 2, "half as many keys"


def residuals(remat, kernel):
    """Shapes of the residuals that a layer's backward pass reads, except its inputs."""
    part, x = Attention(num_heads=2, head_dim=4, kernel=kernel), jnp.ones((1, LENGTH, MODEL_DIM))
    params = jax.tree.map(lambda spec: jnp.ones(spec.shape), part.specs(Dims(MODEL_DIM)))

    def layer(params, x):
        return part.apply(params, x, Call().with_defaults(x), Own())[0]

    policy = REMAT[remat]
    layer = layer if remat == "none" else jax.checkpoint(layer, policy=policy)
    kept = jax.eval_shape(lambda *args: jax.vjp(layer, *args)[1], params, x)
    return [leaf.shape for leaf in jax.tree.leaves(kept)]


@pytest.mark.parametrize(
    ("kernel", "output"), [("splash", (1, 2, LENGTH, 4)), ("triton", (1, LENGTH, 2, 16))]
)
def test_what_remat_keeps_of_a_kernel(kernel, output):
    """The output and the log-sums; "full" keeps neither, so the kernel runs twice."""
    sums = (1, 2, LENGTH)
    for remat in ("none", "dots"):
        assert {output, sums} <= set(residuals(remat, kernel))
    assert not {output, sums} & set(residuals("full", kernel))


def test_remat_keeps_what_cudnn_gives():
    """JAX does not export cuDNN's primitive, so it is recognised by name."""
    from jax._src.cudnn import fused_attention_stablehlo as of_jax

    assert keeps_attention(of_jax._dot_product_attention_fwd_p_wrapper)
    assert not keeps_attention(of_jax._dot_product_attention_bwd_p_wrapper)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_a_cache_gives_the_same_by_a_kernel(name):
    """A prompt of five tokens, two of them padding in one row, then one more token."""

    def generated(kernel):
        part, random = dataclasses.replace(PARTS[name], kernel=kernel), np.random.default_rng(0)
        params, cache = (
            jax.tree.map(lambda spec: random.normal(size=spec.shape).astype(np.float32), specs)
            for specs in (
                part.specs(Dims(MODEL_DIM)),
                part.cache_specs(Dims(MODEL_DIM, 0, 7), 2, 8),
            )
        )
        cache = jax.tree.map(jnp.zeros_like, cache) | (
            {"positions": jnp.full((2, 8), -1)} if "positions" in cache else {}
        )
        x, memory = (random.normal(size=(2, n, MODEL_DIM)).astype(np.float32) for n in (6, 7))
        segments = jnp.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
        call = Call(
            jnp.maximum(jnp.cumsum(segments, 1) - 1, 0), segments, contiguous=True, memory=memory,
            memory_segments_BT=jnp.ones((2, 7), jnp.int32), cache_index=jnp.int32(0),
            cache_length=8, prefill=True,
        )  # fmt: skip
        prompt, _, cache = part.apply(params, x[:, :5], call, Own(cache=cache))
        call = dataclasses.replace(
            call, positions_BL=jnp.array([[5], [3]]), segments_BL=jnp.ones((2, 1), jnp.int32),
            cache_index=jnp.int32(5), prefill=False,
        )  # fmt: skip
        return prompt * (segments > 0)[..., None], part.apply(
            params, x[:, 5:], call, Own(cache=cache)
        )[0]

    for got, expected in zip(generated("triton"), generated("xla"), strict=True):
        np.testing.assert_allclose(got, expected, rtol=FLOAT32, atol=FLOAT32 * 10)
        assert np.abs(expected).max() > 0.1
