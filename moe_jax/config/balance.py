"""Settings of balance: what keeps the load of the experts even."""

import dataclasses
import math
from typing import TYPE_CHECKING

from moe_jax.config.check import require, require_at_least, require_choice, require_fraction

if TYPE_CHECKING:
    from moe_jax.config.moe import MoEConfig
    from moe_jax.config.router import RouterConfig

LOAD_BALANCE_CONVENTIONS = ("switch", "flaxformer", "megatron", "huggingface")
LOAD_BALANCE_SCOPES = ("group", "sequence", "microbatch", "global")
BIAS_UPDATES = ("sign", "error", "quantile")
BIAS_SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
    """What keeps the load of the experts even. Weights multiply the mean over MoE layers."""

    load_balance_weight: float = 0.01  # weight of the load-balance loss, bias or not; 0: none
    load_balance_convention: str = "megatron"  # f_e over all K choices / K: 1 at uniform routing
    load_balance_scope: str = "global"  # f_e and P_e are means over: group, sequence, ...
    router_z_loss_weight: float = 0.0  # weight of mean(logsumexp(logits)^2) (ST-MoE: 1e-3)
    importance_loss_weight: float = 0.0  # of CV^2 of a microbatch's gates by expert (Shazeer: 0.1)
    load_loss_weight: float = 0.0  # of CV^2 of its smooth loads; needs noise on the logits
    token_entropy_weight: float = 0.0  # of the mean entropy of a token's distribution: sharpens it
    batch_entropy_weight: float = 0.0  # of what a microbatch's mean distribution lacks in entropy
    batch_entropy_target: float = 0.0  # ... to reach so many nats, log of so many experts; 0: log E
    bias_update_rate: float = 0.0  # loss-free balancing: step of the selection bias; 0: no bias
    bias_update: str = "sign"  # steps by "sign" of the load's error, by "error", to a "quantile"
    bias_update_centered: bool = False  # subtract the mean step, so that the biases' sum stays 0
    bias_update_schedule: str = "constant"  # of the rate, to 0: "linear", "cosine", or "constant"
    bias_frozen_fraction: float = 0.0  # last share of the steps, in which the bias stays as it is

    def __post_init__(self) -> None:
        """Checks the fields."""
        require_choice(
            "balance.load_balance_convention",
            self.load_balance_convention,
            LOAD_BALANCE_CONVENTIONS,
        )
        require_choice("balance.load_balance_scope", self.load_balance_scope, LOAD_BALANCE_SCOPES)
        require_choice("balance.bias_update", self.bias_update, BIAS_UPDATES)
        require_choice("balance.bias_update_schedule", self.bias_update_schedule, BIAS_SCHEDULES)
        require_fraction("balance.bias_frozen_fraction", self.bias_frozen_fraction)
        for name in (
            "load_balance_weight", "router_z_loss_weight", "importance_loss_weight",
            "load_loss_weight", "token_entropy_weight", "batch_entropy_weight",
            "batch_entropy_target", "bias_update_rate",
        ):  # fmt: skip
            require_at_least(f"balance.{name}", getattr(self, name), 0)
        require(
            self.load_balance_convention != "huggingface"
            or self.load_balance_scope in ("microbatch", "global"),
            "balance.load_balance_convention='huggingface' multiplies means over all layers and "
            "tokens, so its scope is 'microbatch' or 'global'",
            f"load_balance_scope={self.load_balance_scope!r}",
            "Change the scope or the convention",
        )
        require(
            self.batch_entropy_target == 0 or self.batch_entropy_weight > 0,
            "balance.batch_entropy_target is of the loss that balance.batch_entropy_weight weighs",
            f"batch_entropy_target={self.batch_entropy_target}, batch_entropy_weight=0",
            "Set both or none",
        )
        self._check_bias()

    def _check_bias(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(
                self.bias_update_rate > 0
                or not field.name.startswith("bias_")
                or value == field.default,
                f"balance.{field.name} needs a selection bias that moves",
                f"{field.name}={value!r}, bias_update_rate=0",
                "Set balance.bias_update_rate, or drop it",
            )
        if self.bias_update == "quantile":
            require(
                self.bias_update_rate <= 1,
                "balance.bias_update='quantile' goes the share bias_update_rate of the way to the "
                "quantile",
                f"bias_update_rate={self.bias_update_rate}",
                "Set it to 1 to take the quantile itself, or less for a moving average",
            )
            require(
                not self.bias_update_centered,
                "balance.bias_update='quantile' centres its biases by itself",
                "bias_update_centered=True",
                "Drop it",
            )


def check_balance(moe: "MoEConfig") -> None:
    """Checks what the balance of a block asks of the rest of it."""
    balance, router, num_options = moe.balance, moe.router, moe.num_options
    require(
        balance.batch_entropy_target <= math.log(num_options),
        "balance.batch_entropy_target is at most the log of the number of experts, the most "
        "entropy there is",
        f"batch_entropy_target={balance.batch_entropy_target}, {num_options} experts, "
        f"log {math.log(num_options):.4f}",
        "Lower it, or set it to 0 for that log",
    )
    weights = (balance.token_entropy_weight, balance.batch_entropy_weight)
    require(
        router.kind not in ("soft", "hash", "random", "uniform") or not any(weights),
        "entropy losses need a router whose probabilities learn",
        f"router.kind={router.kind!r}, balance.token_entropy_weight={weights[0]}, "
        f"balance.batch_entropy_weight={weights[1]}",
        "Set both to 0",
    )
    if balance.load_loss_weight > 0:
        _check_load_loss(balance, router)
    if balance.bias_update != "quantile":
        return
    require(
        moe.num_selected_experts < num_options,
        "balance.bias_update='quantile' compares with the best expert that is not selected",
        f"num_selected_experts={moe.num_selected_experts}, {num_options} experts",
        "Lower num_selected_experts, or set balance.bias_update_rate=0: all are selected",
    )
    require(
        router.num_selected_groups == router.num_expert_groups and router.score == "sigmoid",
        "balance.bias_update='quantile' counts scores of all experts in a thousand bins between 0 "
        "and 1, too coarse for a softmax over many",
        f"router.score={router.score!r}, num_selected_groups={router.num_selected_groups} of "
        f"{router.num_expert_groups}",
        "Use router.score='sigmoid' without groups, or another balance.bias_update",
    )


def _check_load_loss(balance: BalanceConfig, router: "RouterConfig") -> None:
    require(
        router.kind == "token_choice",
        "balance.load_loss_weight is of token choice",
        f"router.kind={router.kind!r}, load_loss_weight={balance.load_loss_weight}",
        "Set it to 0",
    )
    require(
        balance.bias_update_rate == 0
        and router.num_selected_groups == router.num_expert_groups
        and router.selection == "best",
        "balance.load_loss_weight asks how likely an expert is among the best of all by its noisy "
        "logit, and a selection bias, a limit to groups or a draw select by something else",
        f"load_loss_weight={balance.load_loss_weight}, bias_update_rate="
        f"{balance.bias_update_rate}, router.num_selected_groups={router.num_selected_groups} of "
        f"{router.num_expert_groups}, router.selection={router.selection!r}",
        "Set balance.load_loss_weight=0, or select the plain best",
    )
    least_noise = min(router.logit_noise_std, router.start_of("logit_noise_std"))
    require(
        router.learned_noise or least_noise > 0,
        "balance.load_loss_weight needs noise on the logits at every step, which makes the load "
        "smooth",
        f"load_loss_weight={balance.load_loss_weight}, router.learned_noise=False, "
        f"least router.logit_noise_std={least_noise:g}",
        "Set router.learned_noise=True, or router.logit_noise_std",
    )
