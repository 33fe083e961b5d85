"""MoE layers of other systems for `benchmarks.moe_layer --peers`, if they can be imported.

They run eagerly on PyTorch, as installed, with one thread per core. Both have only GLU experts:
where ours are plain MLPs, theirs have two thirds of the hidden units, which costs the same.
"""

from collections.abc import Callable
from typing import Any

Programs = tuple[Callable[[], None], Callable[[], None]]


def peer_candidates(shape: Any, sequences: int, length: int, model_dim: int) -> dict[str, Programs]:
    """Forward, and forward+backward, of each peer layer that can be imported.

    Args:
      shape: `moe_layer.Shape`.
      sequences: number of sequences.
      length: tokens per sequence.
      model_dim: M.
    """
    hidden = shape.expert_dim if shape.activation == "swiglu" else shape.expert_dim * 2 // 3
    makers = {
        "transformers grouped_mm": _transformers,
        "st-moe-pytorch, factor 1.25": _st_moe,
    }
    found = {}
    for name, make in makers.items():
        try:
            layer = make(shape, model_dim, hidden)
        except ImportError as error:
            print(f"{name}: not installed ({error})")
            continue
        if layer is not None:
            found[name] = _programs(layer, (sequences, length, model_dim))
    return found


def _programs(layer: Any, size: tuple[int, int, int]) -> Programs:
    import torch

    x = torch.randn(*size, requires_grad=True)

    def output() -> Any:
        y = layer(x)
        return y if isinstance(y, torch.Tensor) else y[0]

    def forward() -> None:
        with torch.no_grad():
            output()

    def forward_backward() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        torch.sin(output()).sum().backward()

    return forward, forward_backward


def _transformers(shape: Any, model_dim: int, hidden: int) -> Any:
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=model_dim,
        intermediate_size=-(-hidden // 4) * 4,  # its kernel requires rows of 16 bytes
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.num_selected,
    )
    config._experts_implementation = "grouped_mm"
    layer = MixtralSparseMoeBlock(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return layer


def _st_moe(shape: Any, model_dim: int, hidden: int) -> Any:
    if shape.num_selected < 2:
        return None  # st-moe-pytorch has no top-1 routing
    from st_moe_pytorch import MoE

    return MoE(
        model_dim,
        num_experts=shape.num_experts,
        gating_top_n=shape.num_selected,
        # Hidden dim before its own factor of two thirds; half a unit more against rounding down.
        expert_hidden_mult=(hidden + 0.5) * 1.5 / model_dim,
        # Its capacity formula leaves K out.
        capacity_factor_train=1.25 * shape.num_selected,
        capacity_factor_eval=1.25 * shape.num_selected,
    )
