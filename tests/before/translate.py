"""Translates settings and parameters of commit f891836 to current ones."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.config.kinds import load_kind
from moe_jax.layers.attention import Attention
from moe_jax.layers.feed_forward import Mlp
from moe_jax.layers.norms import RMSNorm
from moe_jax.layers.rotary import Rotary
from moe_jax.models.model import LanguageModel
from moe_jax.models.stack import StackLayout
from moe_jax.moe import balance, bias
from moe_jax.moe import load_balance as conventions
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.moe.routing import assignment, fixed, logits, noise, selection, token_choice
from moe_jax.moe.routing.cosine import Cosine
from moe_jax.moe.routing.expert_choice import ExpertChoice
from moe_jax.moe.routing.soft import Soft

CONVENTIONS = {
    "megatron": conventions.LoadBalance,
    "switch": conventions.SwitchLoadBalance,
    "flaxformer": conventions.FlaxformerLoadBalance,
    "huggingface": conventions.HuggingFaceLoadBalance,
}
UPDATES = {
    "sign": bias.SignUpdate, "error": bias.ErrorUpdate, "quantile": bias.QuantileUpdate,
}  # fmt: skip
Old = Mapping[str, Any]


def kind(family: str, name: str) -> Any:
    """An object of a kind with default settings."""
    return load_kind(family, name)()


def logit_settings(old: Old) -> dict[str, Any]:
    """Settings that all routers with logits share."""
    starts, steps = dict(old["anneal_from"]), old["anneal_steps"]

    def annealed(name: str) -> dict[str, Any]:
        return {"anneal_from": starts[name], "anneal_steps": steps} if name in starts else {}

    noises: list[noise.Noise] = []
    if old["input_jitter"] or "input_jitter" in starts:
        noises.append(noise.Jitter(old["input_jitter"], **annealed("input_jitter")))
    if old["logit_noise_std"] or "logit_noise_std" in starts:
        noises.append(noise.Gaussian(old["logit_noise_std"], **annealed("logit_noise_std")))
    if old["learned_noise"]:
        noises.append(noise.Learned())
    projection: Any = logits.Linear(temperature=old["temperature"], **annealed("temperature"))
    if old["cosine_dim"]:
        projection = Cosine(dim=old["cosine_dim"], temperature=old["temperature"])
    return {
        "projection": projection,
        "noise": tuple(noises),
        "init_stddev": old["init_stddev"],
    }


def score(old: Old) -> logits.Score:
    """Softmax before or after top-K, or sigmoids."""
    if old["score"] == "sigmoid":
        return logits.Sigmoid()
    over_selected = not old["score_before_topk"]
    return logits.SoftmaxOverSelected() if over_selected else logits.Softmax()


def policy(name: str, threshold: float) -> Any:
    """The policy for which later choices count."""
    return {
        "all": lambda: None,
        "none": selection.FirstChoice,
        "threshold": lambda: selection.Threshold(threshold),
        "random": lambda: selection.RandomChoices(threshold),
    }[name]()


def router(old: Old) -> Any:
    """The router of a `RouterConfig`."""
    shared = {"scaling_factor": old["scaling_factor"], "dtype": old["dtype"]}
    match old["kind"]:
        case "token_choice":
            groups = None
            if old["num_selected_groups"] < old["num_expert_groups"]:
                groups = selection.ExpertGroups(
                    old["num_expert_groups"], old["num_selected_groups"], old["group_score"]
                )
            draws = old["selection"] != "best"
            return token_choice.TokenChoice(
                score=score(old),
                renormalize=old["renormalize"],
                groups=groups,
                selection=kind("selection", old["selection"]) if draws else None,
                top_p=old["top_p"],
                choices=policy(old["choice_policy"], old["choice_threshold"]),
                eval_choices=policy(old["eval_choice_policy"], old["choice_threshold"]),
                **logit_settings(old),
                **shared,
            )
        case "expert_choice":
            return ExpertChoice(
                max_experts=old["max_experts"],
                predictor_loss_weight=old["predictor_loss_weight"],
                **logit_settings(old),
                **shared,
            )
        case "soft":
            return Soft(init_stddev=old["init_stddev"], **shared)
        case "sinkhorn":
            return assignment.Sinkhorn(
                score=score(old), renormalize=old["renormalize"], **logit_settings(old), **shared
            )
        case "base":
            return assignment.Base(**logit_settings(old), **shared)
        case "hash":
            table = tuple(old["hash_table"])
            return fixed.Hash(by=old["hash_by"], seed=old["hash_seed"], table=table, **shared)
        case "random":
            return fixed.Random(seed=old["hash_seed"], **shared)
        case "uniform":
            return fixed.Uniform(**shared)
    raise ValueError(old["kind"])


def losses(old: Old) -> tuple[balance.BalanceLoss, ...]:
    """The losses of a `BalanceConfig`; even at weight 0, load balance and router z are measured."""
    load_balance = CONVENTIONS[old["load_balance_convention"]](
        weight=old["load_balance_weight"], scope=old["load_balance_scope"]
    )
    target = old["batch_entropy_target"]
    found = [load_balance, balance.RouterZ(weight=old["router_z_loss_weight"])]
    for name, make in (
        ("importance_loss", balance.Importance),
        ("load_loss", balance.Load),
        ("token_entropy", balance.TokenEntropy),
        ("batch_entropy", lambda weight: balance.BatchEntropy(weight=weight, target=target)),
    ):
        if old[f"{name}_weight"] > 0:
            found.append(make(weight=old[f"{name}_weight"]))
    return tuple(found)


def bias_update(old: Old) -> bias.BiasUpdate | None:
    """The selection bias of a `BalanceConfig`."""
    if old["bias_update_rate"] == 0:
        return None
    centered = {"centered": True} if old["bias_update_centered"] else {}
    return UPDATES[old["bias_update"]](
        rate=old["bias_update_rate"],
        schedule=old["bias_update_schedule"],
        frozen_fraction=old["bias_frozen_fraction"],
        **centered,
    )


def moe(old: Old) -> MoE:
    """The block of a `MoEConfig`."""
    rule = dict(old["capacity"])
    rule["queue"] = kind("queue", rule.pop("queue_order"))
    return MoE(
        num_experts=old["num_experts"],
        num_selected_experts=old["num_selected_experts"],
        eval_num_selected_experts=old["eval_num_selected_experts"],
        num_zero_experts=old["num_zero_experts"],
        num_copy_experts=old["num_copy_experts"],
        expert_dim=old["expert_dim"],
        activation=kind("activation", old["activation"]),
        use_bias=old["use_bias"],
        shared_expert_dim=old["num_shared_experts"] * old["expert_dim"],
        shared_expert_gate=old["shared_expert_gate"],
        gate_on_input=old["router"]["gate_on_input"],
        expert_dropout_rate=old["expert_dropout_rate"],
        init_scale=old["init_scale"],
        identical_init=old["identical_init"],
        group_size=old["group_size"],
        router=router(old["router"]),
        losses=losses(old["balance"]),
        bias=bias_update(old["balance"]),
        capacity=Capacity(**rule),
        run_experts=old["dispatch"],
        exchange=old["exchange"],
        exchange_chunks=old["exchange_chunks"],
    )


def moe_layers(old: Old) -> tuple[int, ...]:
    """The MoE layers of a `ModelConfig`."""
    settings = old["moe"]
    if settings["layers"]:
        return tuple(settings["layers"])
    if settings["layer_period"] == 0:
        return ()
    start = settings["num_dense_first"] + settings["layer_offset"]
    return tuple(range(start, old["num_layers"], settings["layer_period"]))


def model(old: Old) -> LanguageModel:
    """The model of a `ModelConfig`."""
    is_moe = [layer in moe_layers(old) for layer in range(old["num_layers"])]
    layers = [("attention", "moe" if one else "mlp") for one in is_moe]
    parts: dict[str, Any] = {
        "attention": Attention(
            num_heads=old["num_heads"],
            num_kv_heads=old["num_kv_heads"],
            head_dim=old["head_dim"],
            biases=tuple("qkvo") if old["attention_bias"] else (),
            qk_norm=RMSNorm(old["norm_epsilon"]) if old["qk_norm"] else None,
            rotary=Rotary(base=old["rope_base"]),
            init_scale=old["init_scale"],
        )
    }
    if any(is_moe):
        parts["moe"] = moe(old["moe"])
    if not all(is_moe):
        parts["mlp"] = Mlp(
            dim=old["ffn_dim"],
            activation=kind("activation", old["activation"]),
            use_bias=old["ffn_bias"],
            init_scale=old["init_scale"],
        )
    lookahead = old["moe"]["allow_noncausal_routing"]
    return LanguageModel(
        vocab_size=old["vocab_size"],
        model_dim=old["model_dim"],
        parts=parts,  # type: ignore[arg-type] - a dict by name is accepted
        stack=StackLayout.of(layers, allow_lookahead=lookahead),
        norm=load_kind("norm", old["norm"])(old["norm_epsilon"]),
        tie_embeddings=old["tie_embeddings"],
        dropout_rate=old["dropout_rate"],
        compute_dtype=old["compute_dtype"],
        scan_layers=old["scan_layers"],
        remat=old["remat"],
    )


ROUTER = {
    "router": "weight", "router_scale": "scale", "router_projection": "projection",
    "router_log_scale": "log_scale", "router_predictor": "predictor/weight",
    "router_predictor_bias": "predictor/bias",
}  # fmt: skip


def block_path(name: str) -> str:
    """The path of an old block's parameter in the new tree."""
    if name == "router_noise":
        return "router/noise/learned/weight"
    if name in ROUTER:
        return f"router/{ROUTER[name]}"
    if name.startswith("shared_"):
        return f"shared/{name.removeprefix('shared_')}"
    return f"experts/{name}"


def block_parameters(arrays: Mapping[str, np.ndarray], block: MoE) -> dict[str, Any]:
    """The parameters, or gradients, of a block from their old names to the new tree."""
    tree: dict[str, Any] = {}
    for name, value in arrays.items():
        put(tree, block_path(name), value)
    return tree


def model_parameters(arrays: Mapping[str, np.ndarray], new: LanguageModel) -> dict[str, Any]:
    """The parameters, or gradients, of a model from their old paths to the new tree.

    The old model kept unrolled layers of a repeated unit separately; they are stacked here.
    """
    layout, tree = new.stack, {}
    alone: dict[str, dict[int, np.ndarray]] = {}
    for path, value in arrays.items():
        segment, _, rest = path.partition("/")
        if segment not in ("first", "repeated", "last"):
            put(tree, path, value)
            continue
        layer, _, rest = rest.partition("/")
        number = int(layer.removeprefix("layer_"))
        if segment == "first" and number >= len(layout.first) and not new.scan_layers:
            after = number - len(layout.first)
            repeat, place = divmod(after, max(len(layout.unit), 1))
            if repeat < layout.repeats:
                rest = layer_path(rest, layout.unit[place], new)
                alone.setdefault(f"stack/unit/{place}/{rest}", {})[repeat] = value
                continue
            segment, number = "last", after - len(layout.unit) * layout.repeats
        segment = {"repeated": "unit"}.get(segment, segment)
        rest = layer_path(rest, getattr(layout, segment)[number], new)
        put(tree, f"stack/{segment}/{number}/{rest}", value)
    for path, by_repeat in alone.items():
        put(tree, path, np.stack([by_repeat[r] for r in sorted(by_repeat)]))
    for segment in ("first", "unit", "last"):
        tree["stack"].setdefault(segment, {})
    return tree


def layer_path(path: str, layer: tuple[str, ...], new: LanguageModel) -> str:
    """The path of an old layer's parameter in the tree of a new layer with these branches."""
    branch, _, rest = path.partition("/")
    if branch == "ffn_norm":
        return f"{layer[1]}_norm/{rest}"
    if branch == "ffn":
        return f"mlp/{rest}"
    if branch == "moe":
        block = new.part["moe"]
        assert isinstance(block, MoE)
        return f"moe/{block_path(rest)}"
    return path


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Sets a leaf of nested dicts."""
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = value
