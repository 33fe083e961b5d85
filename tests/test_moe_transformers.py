"""MoE blocks of published models equal those of transformers with the same weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe.activations import ClampedSwiGLU, SwiGLU
from moe_jax.moe.block import moe_block
from moe_jax.moe.part import MoE
from moe_jax.moe.routing.logits import Linear, Sigmoid, SoftmaxOverSelected
from moe_jax.moe.routing.selection import ExpertGroups
from moe_jax.moe.routing.sparse_mixer import SparseMixer, next_choice
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.part import Call, Own

pytestmark = pytest.mark.slow

M, H, E, K = 12, 10, 8, 3
# Sums of some float32 products; gradients are compared relative to their norm.
OUTPUTS, GRADIENTS = 1e-5, 1e-5


def stacked(tensors, gate_up="experts.gate_up_proj", down="experts.down_proj"):
    """Stacks the experts' matrices: [E, 2H, M] (gates first) and [E, M, H]."""
    gate, up = np.split(tensors[gate_up], 2, axis=1)
    return {"wg": gate.swapaxes(1, 2), "wi": up.swapaxes(1, 2), "wo": tensors[down].swapaxes(1, 2)}


def one(tensors, prefix):
    """Converts a dense SwiGLU."""
    names = {"wg": "gate_proj", "wi": "up_proj", "wo": "down_proj"}
    return {name: tensors[f"{prefix}.{theirs}.weight"].T for name, theirs in names.items()}


def usual(gate):
    """Converts a router's matrix of that name, and stacked experts."""
    return lambda t: {"router": {"weight": t[gate].T}, "experts": stacked(t)}


def with_shared(name):
    """The same with a shared expert of that name."""
    return lambda t: {**usual("gate.weight")(t), "shared": one(t, name)}


def of_qwen2(tensors):
    params = with_shared("shared_expert")(tensors)
    params["shared"]["gate"] = tensors["shared_expert_gate.weight"].T
    return params


def of_dbrx(tensors):
    names = {"wg": "w1", "wi": "v1", "wo": "w2"}
    experts = {
        ours: tensors[f"experts.mlp.{name}"].reshape(E, H, M) for ours, name in names.items()
    }
    experts |= {name: experts[name].swapaxes(1, 2) for name in ("wg", "wi")}
    return {"router": {"weight": tensors["router.layer.weight"].T}, "experts": experts}


def of_gpt_oss(tensors):
    both, bias = tensors["experts.gate_up_proj"], tensors["experts.gate_up_proj_bias"]
    experts = {
        "wg": both[..., ::2], "wi": both[..., 1::2], "wo": tensors["experts.down_proj"],
        "bg": bias[..., ::2], "bi": bias[..., 1::2], "bo": tensors["experts.down_proj_bias"],
    }  # fmt: skip
    router = {"weight": tensors["router.weight"].T, "bias": tensors["router.bias"]}
    return {"router": router, "experts": experts}


def of_llama4(tensors):
    gate, up = np.split(tensors["experts.gate_up_proj"], 2, axis=-1)
    experts = {"wg": gate, "wi": up, "wo": tensors["experts.down_proj"]}
    router = {"weight": tensors["router.weight"].T}
    return {"router": router, "experts": experts, "shared": one(tensors, "shared_expert")}


@dataclasses.dataclass(frozen=True)
class Case:
    """A published block: its place in transformers, its config, and our settings and names."""

    package: str  # of transformers.models
    config_class: str
    block_class: str
    config: dict[str, Any]
    moe: dict[str, Any]
    convert: Callable[[dict[str, np.ndarray]], dict[str, Any]]
    bias: str = ""  # the buffer that is our selection bias


OURS: dict[str, Any] = {
    "num_experts": E, "num_selected_experts": K, "expert_dim": H, "activation": SwiGLU(),
}  # fmt: skip
SIZES = {"hidden_size": M, "num_experts_per_tok": K}
NARROW = SIZES | {"num_experts": E, "moe_intermediate_size": H}
LOCAL = SIZES | {"num_local_experts": E, "intermediate_size": H}
DEEPSEEK = SIZES | {"moe_intermediate_size": H, "n_shared_experts": 2}
DEEPSEEK |= {"n_group": 4, "topk_group": 2, "n_routed_experts": E, "num_attention_heads": 4}
SHARED = {"shared_expert_dim": 2 * H}
DBRX = {
    "hidden_size": M, "ffn_hidden_size": H, "moe_num_experts": E, "moe_top_k": K,
    "ffn_act_fn": {"name": "silu"},
}  # fmt: skip
CASES = {
    "mixtral": Case(
        "mixtral", "MixtralConfig", "MixtralSparseMoeBlock", LOCAL,
        {"router": TokenChoice(score=SoftmaxOverSelected())}, usual("gate.weight"),
    ),
    "olmoe": Case(
        "olmoe", "OlmoeConfig", "OlmoeSparseMoeBlock",
        SIZES | {"num_experts": E, "intermediate_size": H, "norm_topk_prob": False},
        {"router": TokenChoice()}, usual("gate.weight"),
    ),
    "qwen3": Case(
        "qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock", NARROW | {"norm_topk_prob": True},
        {"router": TokenChoice(renormalize=True)}, usual("gate.weight"),
    ),
    "qwen2": Case(
        "qwen2_moe", "Qwen2MoeConfig", "Qwen2MoeSparseMoeBlock",
        NARROW | {"shared_expert_intermediate_size": 2 * H, "norm_topk_prob": False},
        {"router": TokenChoice(), "shared_expert_gate": True, **SHARED}, of_qwen2,
    ),
    "jamba": Case(
        "jamba", "JambaConfig", "JambaSparseMoeBlock",
        SIZES | {"num_experts": E, "intermediate_size": H},
        {"router": TokenChoice()}, usual("router.weight"),
    ),
    "granite": Case(
        "granitemoe", "GraniteMoeConfig", "GraniteMoeMoE", LOCAL,
        {"router": TokenChoice(score=SoftmaxOverSelected())}, usual("router.weight"),
    ),
    "dbrx": Case(
        "dbrx", "DbrxConfig", "DbrxFFN",
        {"d_model": M, "ffn_config": DBRX | {"moe_normalize_expert_weights": 1.0}},
        {"router": TokenChoice(renormalize=True)}, of_dbrx,
    ),
    "gpt-oss": Case(
        "gpt_oss", "GptOssConfig", "GptOssMLP",
        LOCAL | {"swiglu_limit": 1.5, "swiglu_alpha": 1.702},
        {
            "router": TokenChoice(score=SoftmaxOverSelected(), projection=Linear(use_bias=True)),
            "activation": ClampedSwiGLU(limit=1.5), "use_bias": True,
        },
        of_gpt_oss,
    ),
    "llama4": Case(
        "llama4", "Llama4TextConfig", "Llama4TextMoe", LOCAL,
        {"router": TokenChoice(score=Sigmoid()), "gate_on_input": True, "shared_expert_dim": H},
        of_llama4,
    ),
    "deepseek v2": Case(
        "deepseek_v2", "DeepseekV2Config", "DeepseekV2Moe",
        DEEPSEEK | {
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
        },
        {"router": TokenChoice(groups=ExpertGroups(4, 2, "max"), scaling_factor=16.0), **SHARED},
        with_shared("shared_experts"),
    ),
    "deepseek v3": Case(
        "deepseek_v3", "DeepseekV3Config", "DeepseekV3MoE",
        DEEPSEEK | {
            "routed_scaling_factor": 2.5, "norm_topk_prob": True,
        },
        {
            "router": TokenChoice(
                score=Sigmoid(), renormalize=True, scaling_factor=2.5,
                groups=ExpertGroups(4, 2, "top2_sum"),
            ),
            **SHARED,
        },
        with_shared("shared_experts"), bias="gate.e_score_correction_bias",
    ),
    "phi": Case(
        "phimoe", "PhimoeConfig", "PhimoeSparseMoeBlock",
        LOCAL | {"num_experts_per_tok": 2, "router_jitter_noise": 0.2},
        {"router": SparseMixer(jitter=0.2), "num_selected_experts": 2}, usual("router.weight"),
    ),
}  # fmt: skip


def their_block(case, scale=0.5):
    """The block of transformers in evaluation mode, with random parameters and buffers."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    package = getattr(transformers.models, case.package)
    config = getattr(getattr(package, f"configuration_{case.package}"), case.config_class)(
        **case.config
    )
    config._experts_implementation = "eager"
    block = getattr(getattr(package, f"modeling_{case.package}"), case.block_class)(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for value in (*block.parameters(), *block.buffers()):
            value.copy_(torch.randn(value.shape) * scale)
    return block, torch


def tensors_of(values):
    return {name: value.detach().numpy().copy() for name, value in values}


@pytest.mark.parametrize("name", CASES)
def test_outputs_choices_and_gradients(name):
    case = CASES[name]
    block, torch = their_block(case)
    moe = MoE(**(OURS | case.moe))
    random = np.random.default_rng(0)
    x, dy = random.normal(size=(2, 2, 40, M)).astype(np.float32)

    their_x = torch.tensor(x, requires_grad=True)
    theirs = block(their_x)
    theirs = (theirs[0] if isinstance(theirs, tuple) else theirs).reshape(x.shape)
    (theirs * torch.tensor(dy)).sum().backward()

    params = case.convert(tensors_of(block.named_parameters()))
    expected = case.convert(tensors_of((n, p.grad) for n, p in block.named_parameters()))
    state = None
    if case.bias:
        state = {"bias_E": tensors_of(block.named_buffers())[case.bias]}

    def total(params, x):
        y, aux = moe_block(params, x, moe, Call(capacity=0.0, record=True), Own(state=state))
        return jnp.sum(y * dy), (y, aux)

    with jax.default_matmul_precision("highest"):
        grads, (y, aux) = jax.grad(total, (0, 1), has_aux=True)(params, x)
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(y, theirs, rtol=0, atol=OUTPUTS * np.abs(theirs).max())
    used = np.unique(np.asarray(aux.choices.expert_index))
    assert len(used) == E  # every expert has been compared
    assert jax.tree.structure(grads[0]) == jax.tree.structure(expected)
    pairs = jax.tree.map(lambda a, b: (np.asarray(a), b), grads[0], expected)
    pairs = jax.tree.leaves(pairs, is_leaf=lambda leaf: isinstance(leaf, tuple))
    for ours, other in (*pairs, (np.asarray(grads[1]), their_x.grad.numpy())):
        assert np.linalg.norm(ours - other) <= GRADIENTS * np.linalg.norm(other)


@pytest.mark.parametrize("scale", [0.5, 5.0])
@pytest.mark.parametrize("shift", [0.0, -3.0])
def test_limited_groups_of_deepseek_v3(scale, shift):
    """The experts agree, even with biased scores below 0, which a mask of 0 would beat."""
    case = CASES["deepseek v3"]
    block, torch = their_block(case, scale)
    with torch.no_grad():
        block.gate.e_score_correction_bias.add_(shift)
    x = np.random.default_rng(1).normal(size=(4, 64, M)).astype(np.float32)
    with torch.no_grad():
        _, weights, chosen = block.gate(torch.tensor(x))
    params = case.convert(tensors_of(block.named_parameters()))
    state = {"bias_E": tensors_of(block.named_buffers())[case.bias]}
    call = Call(capacity=0.0, record=True)
    choices = moe_block(params, x, MoE(**(OURS | case.moe)), call, Own(state=state))[1].choices
    ours = np.asarray(choices.expert_index).reshape(-1, K)
    order, theirs_order = np.argsort(ours), np.argsort(chosen.numpy())
    np.testing.assert_array_equal(
        np.take_along_axis(ours, order, 1), np.take_along_axis(chosen.numpy(), theirs_order, 1)
    )
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(choices.gate).reshape(-1, K), order, 1),
        np.take_along_axis(weights.numpy(), theirs_order, 1), rtol=2e-5, atol=1e-7,
    )  # fmt: skip


def test_the_estimator_of_phi_from_the_same_draws(monkeypatch):
    """Gates and gradients in training, with our random numbers instead of torch's."""
    torch = pytest.importorskip("torch")
    phi = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    random = np.random.default_rng(0)
    logits, dy = random.normal(size=(300, E)).astype(np.float32), random.normal(size=(300, 2))
    keys = [jax.random.key(k) for k in range(2)]
    draws = [jax.random.split(key) for key in keys]
    gumbel = [np.array(jax.random.gumbel(key, (1, 300, E)))[0] for key, _ in draws]
    uniform = [np.array(jax.random.uniform(key, (1, 300))).T for _, key in draws]
    exponential, uniforms = iter(gumbel), iter(uniform)
    monkeypatch.setattr(
        torch.Tensor, "exponential_",
        lambda self: torch.exp(-torch.tensor(next(exponential))),
    )  # fmt: skip
    monkeypatch.setattr(torch, "rand_like", lambda _: torch.tensor(next(uniforms)))
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self: self)
    scores = torch.tensor(logits, requires_grad=True)
    gates, chosen = phi.sparsemixer(scores, jitter_eps=0.3, training=True)
    (gates * torch.tensor(dy)).sum().backward()

    def total(logits):
        left, chosen, gates = jnp.ones(logits.shape, bool), [], []
        for key in keys:
            index, gate = next_choice(logits, left, 0.3, key)
            left &= jnp.arange(E) != index[..., None]
            chosen.append(index)
            gates.append(gate)
        gates = jnp.stack(gates, -1)[0]
        return jnp.sum(gates * dy), (gates, jnp.stack(chosen, -1)[0])

    grad, (ours, index) = jax.grad(total, has_aux=True)(jnp.asarray(logits)[None])
    np.testing.assert_array_equal(index, chosen.numpy())
    np.testing.assert_allclose(ours, gates.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(grad[0], scores.grad.numpy(), atol=1e-6)
    assert np.abs(scores.grad.numpy()).max() > 0.1
