"""Mamba: the chunked scan, documents, padding, continued calls, and Jamba's mixer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.costs import traced_costs
from moe_jax.layers import mamba
from moe_jax.layers.mamba import Mamba, selective_scan
from moe_jax.parameters import init_parameters
from moe_jax.part import Call, Dims, Own

MODEL_DIM, LENGTH = 4, 7
DIMS = Dims(MODEL_DIM)
# The chunk size does not divide the length; every option is on.
PART = Mamba(
    state_dim=3, conv_kernel=3, dt_rank=2, use_bias=True, inner_norms=True, chunk_size=5
)  # fmt: skip
CLOSE = 2e-6


def wave(shape, start):
    """Numbers in [-1, 1] that are the same in every language."""
    count = int(np.prod(shape))
    return np.sin(1.7 * np.arange(count) + start).reshape(shape).astype(np.float32)


def waves(part):
    """Parameters away from their neutral values; norm scales in [0.5, 1.5]."""

    def draw(path, spec):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        values = wave(spec.shape, start=len(name) + ord(name[0]))
        return 1 + values / 2 if "norm" in name else values

    return jax.tree_util.tree_map_with_path(draw, part.specs(DIMS))


PARAMS, TOKENS = waves(PART), 2 * wave((1, LENGTH, MODEL_DIM), 0.3)


@jax.jit
def run(x_BLM, segments_BL, cache=None):
    """The outputs of a call, and the cache after it."""
    call = Call(segments_BL=segments_BL).with_defaults(x_BLM)
    y_BLM, _, cache = PART.apply(PARAMS, x_BLM, call, Own(cache=cache))
    return y_BLM, cache


def single(x_LM):
    """The outputs of one sequence by the definition, token by token, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), PARAMS)

    def silu(a):
        return a / (1 + np.exp(-a))

    def normed(a, name):
        return a / np.sqrt(np.mean(a**2) + PART.norm_epsilon) * p[name]["scale"]

    state, outputs = 0.0, []
    inputs = np.pad(x_LM @ p["wx"] + p["bx"], ((PART.conv_kernel - 1, 0), (0, 0)))
    for i, token in enumerate(x_LM):
        x = silu(np.sum(inputs[i : i + PART.conv_kernel] * p["conv"], axis=0) + p["conv_bias"])
        dt, b, c = np.split(x @ p["x_proj"], [PART.dt_rank, PART.dt_rank + PART.state_dim])
        dt = np.log1p(np.exp(normed(dt, "dt_norm") @ p["dt_proj"] + p["dt_bias"]))
        decay = np.exp(-dt[:, None] * np.exp(p["a_log"]))
        state = decay * state + np.outer(dt * x, normed(b, "b_norm"))
        y = (state @ normed(c, "c_norm") + p["d"] * x) * silu(token @ p["wz"] + p["bz"])
        outputs.append(y @ p["wo"] + p["bo"])
    return np.stack(outputs)


def close(got, expected, scale=CLOSE):
    np.testing.assert_allclose(got, expected, rtol=0, atol=scale * np.abs(expected).max())


def check_documents():
    """Asserts that three documents in a row with padding give what each gives alone."""
    segments = np.array([[0, 0, 1, 1, 1, 0, 2, 2, 2, 2, 3, 3, 0]])
    x = wave((1, 13, MODEL_DIM), 0.9)
    y, _ = run(x, segments)
    for document in (1, 2, 3):
        where = segments == document
        close(y[where], single(x[where]))


def test_the_scan_is_the_recurrence_that_defines_it():
    y, cache = run(TOKENS, np.ones((1, LENGTH), np.int32))
    assert cache is None
    close(y[0], single(TOKENS[0]))


def test_documents_and_padding_leave_each_other_alone():
    check_documents()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["convolution", "scan"])
def test_documents_that_see_each_other_are_found_out(fault, monkeypatch):
    """The planted fault: the convolution or the state crosses a document boundary."""
    convolution, scan = mamba.causal_convolution, mamba.selective_scan
    if fault == "convolution":
        faulty = lambda inputs, segments, *rest: convolution(inputs, segments * 0, *rest)  # noqa: E731 (a fault in one line)
        monkeypatch.setattr(mamba, "causal_convolution", faulty)
    else:
        faulty = lambda *given: scan(*given[:5], given[5] & False, *given[6:])  # noqa: E731 (a fault in one line)
        monkeypatch.setattr(mamba, "selective_scan", faulty)
    monkeypatch.setitem(globals(), "run", run.__wrapped__)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_documents()


def sequential(x, dt, a, b, c, starts, state):
    """The recurrence, without chunks."""

    def step(state, token):
        x, dt, b, c, starts = token
        state = jnp.exp(dt[..., None] * a) * jnp.where(starts[:, None, None], 0, state)
        state += (dt * x)[..., None] * b[:, None]
        return state, jnp.einsum("BHZ,BZ->BH", state, c)

    tokens = [jnp.moveaxis(given, 1, 0) for given in (x, dt, b, c, starts)]
    state, y = jax.lax.scan(step, state, tokens)
    return jnp.moveaxis(y, 0, 1), state


@pytest.mark.parametrize("chunk_size", [5, 64])
def test_chunks_give_the_values_and_gradients_of_the_sequential_recurrence(chunk_size):
    batch, length, inner, state = 2, 12, 3, 4
    random = np.random.default_rng(0)

    def draw(*shape):
        return random.normal(size=shape).astype(np.float32)

    given = {
        "x": draw(batch, length, inner), "dt": np.abs(draw(batch, length, inner)),
        "a": -np.abs(draw(inner, state)), "b": draw(batch, length, state),
        "c": draw(batch, length, state), "state": draw(batch, inner, state),
    }  # fmt: skip
    starts = random.random((batch, length)) < 0.2
    weights = draw(batch, length, inner), draw(batch, inner, state)

    @functools.partial(jax.jit, static_argnums=1)
    def of(given, scan):
        def objective(given):
            arguments = [given[name] for name in ("x", "dt", "a", "b", "c")]
            outputs = scan(*arguments, starts, given["state"])
            return sum(map(jnp.vdot, outputs, weights)), outputs

        return jax.grad(objective, has_aux=True)(given)

    expected = of(given, sequential)
    got = of(given, functools.partial(selective_scan, chunk_size=chunk_size))
    jax.tree.map(close, got, expected)


def saved_for_gradients(part, length):
    """Sizes of the arrays that the backward pass of a sequence keeps, except parameters."""
    params = jax.tree.map(lambda s: jnp.zeros(s.shape), part.specs(DIMS))
    x = jnp.zeros((1, length, MODEL_DIM))
    call = Call().with_defaults(x)

    def backward(x):
        return jax.vjp(lambda x: part.apply(params, x, call, Own())[0], x)[1]

    leaves = jax.tree.leaves(jax.eval_shape(backward, x))
    kept = {leaf.shape for leaf in jax.tree.leaves(params)}
    return [leaf.size for leaf in leaves if leaf.shape not in kept]


def test_training_keeps_no_state_of_every_token():
    """The largest array is the convolution's input [W - 1 + L, H]; one state has 32 numbers."""
    part = Mamba(expand=16, state_dim=32, chunk_size=32)
    inner = 16 * MODEL_DIM
    short, long = (saved_for_gradients(part, length) for length in (256, 512))
    assert max(long) == (512 + part.conv_kernel - 1) * inner
    assert sum(long) < 12 * 512 * inner
    assert 1.9 * sum(short) <= sum(long) <= 2 * sum(short), "linear in the length"


def empty_cache(batch):
    specs = PART.cache_specs(DIMS, batch, LENGTH)
    return jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), specs)


@pytest.mark.parametrize("pieces", [(1,) * LENGTH, (3, 4), (5, 1, 1)], ids=str)
@pytest.mark.parametrize(
    "segments",
    [[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 2, 2, 3, 3]],
    ids=["one document", "left padding", "packed"],
)
def test_calls_that_continue_give_what_one_call_gives(pieces, segments):
    segments = np.array([segments], np.int32)
    whole, _ = run(TOKENS, segments)
    cache, start, outputs = empty_cache(1), 0, []
    for length in pieces:
        now = slice(start, start + length)
        y, cache = run(TOKENS[:, now], segments[:, now], cache)
        outputs.append(y)
        start += length
    close(np.concatenate(outputs, axis=1), whole)


def test_a_row_continues_behind_its_last_token_whatever_padding_follows():
    """Prompts of 4 and 2 tokens, padded on the right in one batch; then each continues."""
    prompt = np.repeat(TOKENS[:, :4], 2, axis=0)
    y, cache = run(prompt, np.array([[1, 1, 1, 1], [1, 1, 0, 0]], np.int32), empty_cache(2))
    following = np.concatenate([TOKENS[:, 4:6], TOKENS[:, 2:4]])
    y, cache = run(following, np.ones((2, 2), np.int32), cache)
    expected = single(TOKENS[0])
    close(y[0], expected[4:6])
    close(y[1], expected[2:4])


def test_initial_values_are_those_of_the_paper():
    part = Mamba(state_dim=5)
    params = init_parameters(jax.random.key(0), part.specs(Dims(256)))
    np.testing.assert_allclose(np.exp(params["a_log"]), np.tile([1, 2, 3, 4, 5], (512, 1)), 1e-6)
    np.testing.assert_array_equal(params["d"], 1)
    steps = np.log10(np.log1p(np.exp(np.float64(params["dt_bias"]))))
    assert -3.001 <= steps.min() < -2.9 and -1.1 < steps.max() <= -0.999
    assert abs(steps.mean() + 2) < 0.1, "log-uniform"
    assert params["dt_proj"].shape == (16, 512), "the rank is a sixteenth of the width"
    decaying = {n for n, s in part.specs(DIMS).items() if s.decays}
    assert decaying == {"wx", "wz", "wo", "conv", "x_proj", "dt_proj"}


@pytest.mark.slow
def test_bfloat16_stays_near_float32():
    segments = np.ones((1, LENGTH), np.int32)

    def objective(params, x):
        y = PART.apply(params, x, Call(segments_BL=segments).with_defaults(x), Own())[0]
        return jnp.sum(y.astype(jnp.float32) ** 2), y

    grad = jax.jit(jax.grad(objective, has_aux=True))
    (gradients, y), (_, exact) = grad(PARAMS, TOKENS.astype(jnp.bfloat16)), grad(PARAMS, TOKENS)
    assert y.dtype == jnp.bfloat16
    close(np.float32(y), exact, 0.05)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_costs_that_are_written_out_agree_with_a_trace(dtype):
    part = dataclasses.replace(PART, chunk_size=64)
    written, traced = part.costs(DIMS, 128, dtype), traced_costs(part, DIMS, 128, dtype)
    assert written[0].flops == traced[0].flops
    assert written[0].saved_dots.on(1) == traced[0].saved_dots.on(1)
    assert {cost.kind for cost in written} == {cost.kind for cost in traced}
    sizes = [sum(cost.saved.on(1) for cost in costs) for costs in (written, traced)]
    assert 0.5 * sizes[0] <= sizes[1] <= 2 * sizes[0]


def jamba(tokens):
    """Jamba's mixer in transformers: outputs, and gradients of parameters and inputs.

    The gradients are those of the sum of outputs times `wave`, in our parameter tree.
    """
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.jamba.modeling_jamba")
    config = modeling.JambaConfig(
        hidden_size=MODEL_DIM, mamba_expand=2, mamba_d_state=PART.state_dim,
        mamba_d_conv=PART.conv_kernel, mamba_dt_rank=PART.dt_rank, mamba_conv_bias=True,
        mamba_proj_bias=True, rms_norm_eps=PART.norm_epsilon,
    )  # fmt: skip
    mixer = modeling.JambaMambaMixer(config, layer_idx=0)
    p = PARAMS
    values = {
        "in_proj.weight": np.concatenate([p["wx"], p["wz"]], axis=1).T,
        "in_proj.bias": np.concatenate([p["bx"], p["bz"]]),
        "conv1d.weight": p["conv"].T[:, None], "conv1d.bias": p["conv_bias"],
        "x_proj.weight": p["x_proj"].T, "dt_proj.weight": p["dt_proj"].T,
        "dt_proj.bias": p["dt_bias"], "A_log": p["a_log"], "D": p["d"],
        "out_proj.weight": p["wo"].T, "out_proj.bias": p["bo"],
        **{f"{name}_layernorm.weight": p[f"{name}_norm"]["scale"] for name in ("dt", "b", "c")},
    }  # fmt: skip
    mixer.load_state_dict({name: torch.tensor(np.array(value)) for name, value in values.items()})
    x = torch.tensor(tokens, requires_grad=True)
    y = mixer(x)
    (y * torch.tensor(wave(y.shape, 1.0))).sum().backward()
    g = {name: value.grad.numpy() for name, value in mixer.named_parameters()}
    (wx, wz), (bx, bz) = (np.split(g[f"in_proj.{kind}"].T, 2, -1) for kind in ("weight", "bias"))
    gradients = {
        "wx": wx, "wz": wz, "bx": bx, "bz": bz, "conv": g["conv1d.weight"][:, 0].T,
        "conv_bias": g["conv1d.bias"], "x_proj": g["x_proj.weight"].T,
        "dt_proj": g["dt_proj.weight"].T, "dt_bias": g["dt_proj.bias"], "a_log": g["A_log"],
        "d": g["D"], "wo": g["out_proj.weight"].T, "bo": g["out_proj.bias"],
        **{f"{n}_norm": {"scale": g[f"{n}_layernorm.weight"]} for n in ("dt", "b", "c")},
    }  # fmt: skip
    return y.detach().numpy(), gradients, x.grad.numpy()


def ours(tokens):
    """The same results as `jamba`, from our part."""

    @jax.jit
    def of(params, x):
        def objective(params, x):
            y = PART.apply(params, x, Call().with_defaults(x), Own())[0]
            return jnp.sum(y * wave(y.shape, 1.0)), y

        return jax.grad(objective, argnums=(0, 1), has_aux=True)(params, x)

    (gradients, dx), y = of(PARAMS, tokens)
    return y, gradients, dx


@pytest.mark.slow
def test_transformers_has_the_same_outputs_and_gradients():
    tokens = wave((2, 19, MODEL_DIM), 0.6)
    expected, got = jamba(tokens), ours(tokens)
    np.testing.assert_allclose(got[0], expected[0], rtol=2e-5, atol=2e-5)

    def same(path, given, wanted):
        error = np.linalg.norm(given - wanted) / np.linalg.norm(wanted)
        assert error <= 5e-4, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(same, got[1:], expected[1:])


# Results of `jamba(TOKENS)` with transformers 5.24 and torch 2.13: the output, the gradient of the
# tokens, and gradient norms of the parameters in the order of `jax.tree.leaves`.
SAVED = {
    "y": [
        [-0.6503654, 1.4825671, 0.2683242, -1.5517112],
        [-0.5141146, 1.145823, 0.2188487, -1.2022178],
        [-1.7085518, 1.1671627, 1.4077865, -1.5299339],
        [-2.4871984, 0.9768153, 2.2354841, -1.5528748],
        [-3.2847376, 0.8639866, 3.0620978, -1.6530554],
        [-0.8017368, 3.4385223, -0.0843325, -3.41679],
        [0.3778824, 10.1768007, -3.0003316, -9.4036484],
    ],
    "dx": [
        [1.3356407, 0.1099673, -1.2230973, -1.361696],
        [-2.9458256, -5.8477449, -3.0388029, 2.7378097],
        [-4.5414553, -4.4415722, -0.0040857, 4.4373903],
        [3.8475657, 5.1462946, 1.4191941, -3.6938808],
        [6.5278735, 5.1257629, -1.2821254, -6.4379001],
        [1.6418831, -2.6552904, -4.3593278, -1.8060819],
        [-2.0527792, -2.0980239, -0.0943556, 2.0014594],
    ],
    "norms": [
        17.104321,
        11.358771,
        5.612078,
        27.640236,
        4.672532,
        9.088634,
        67.675842,
        21.846716,
        6.134184,
        4.174648,
        2.115903,
        7.996946,
        16.785667,
        83.886444,
        9.81362,
        83.436966,
    ],
}


def test_outputs_are_those_that_were_saved_of_transformers():
    y, gradients, dx = ours(TOKENS)
    np.testing.assert_allclose(y[0], SAVED["y"], rtol=2e-5, atol=2e-5)
    close(dx[0], SAVED["dx"], 5e-4)
    norms = [np.linalg.norm(leaf) for leaf in jax.tree.leaves(gradients)]
    np.testing.assert_allclose(norms, SAVED["norms"], rtol=5e-4)
