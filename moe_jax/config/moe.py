"""Settings of the MoE block: its experts, and how its router, balance and capacity go together."""

import dataclasses

from moe_jax.config.balance import BalanceConfig, check_balance
from moe_jax.config.capacity import CapacityConfig, queue_is_causal
from moe_jax.config.check import (
    require,
    require_at_least,
    require_choice,
    require_fraction,
    require_positive,
)
from moe_jax.config.families import check_soft_slots, check_zero_computation
from moe_jax.config.router import RouterConfig

ACTIVATIONS = ("relu", "gelu", "swiglu", "geglu")
GATED_ACTIVATIONS = ("swiglu", "geglu")
DISPATCHERS = ("auto", "einsum", "gather", "ragged")
EXCHANGES = ("auto", "compiler", "explicit")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The MoE block, and which layers of the model have one in place of their dense FFN."""

    num_experts: int = 8  # E: routed experts, 1 to 512; with 1 option there is no router
    num_selected_experts: int = 1  # K: routed experts a token uses, 1 to E
    eval_num_selected_experts: int = 0  # K of evaluation and generation, if higher; 0: the same
    num_zero_experts: int = 0  # further choices of a token that add nothing and cost nothing
    num_copy_experts: int = 0  # the same, but add the token itself
    expert_dim: int = 512  # H: hidden dim of one expert
    activation: str = "relu"  # "relu", "gelu": two matrices; "swiglu", "geglu": three
    use_bias: bool = False  # biases in the experts
    num_shared_experts: int = 0  # experts every token uses, computed as one FFN of so many times H
    shared_expert_gate: bool = False  # scale the shared output by sigmoid(x . w) (Qwen)
    expert_dropout_rate: float = 0.0  # dropout on expert hidden units (Switch, fine-tuning: 0.4)
    init_scale: float = 1.0  # variance scale of expert weights over fan-in (Switch: 0.1)
    identical_init: bool = False  # every expert starts from the same weights (V-MoE)
    group_size: int = 0  # tokens among which capacity is counted; 0: one sequence
    dispatch: str = "auto"  # "einsum", "gather", "ragged"; "auto": the fastest of the platform
    exchange: str = "auto"  # between devices: "compiler" (constraints), "explicit" (shard_map)
    exchange_chunks: int = 1  # parts in which slots or tokens travel, to overlap with the experts
    layer_period: int = 1  # every n-th layer is MoE; 0: none
    layer_offset: int = 0  # the first MoE layer of a period
    num_dense_first: int = 0  # the first k layers stay dense, the period starts after them
    layers: tuple[int, ...] = ()  # the MoE layers one by one, in place of the period
    allow_noncausal_routing: bool = False  # accept routing that looks at later tokens
    router: RouterConfig = RouterConfig()
    balance: BalanceConfig = BalanceConfig()
    capacity: CapacityConfig = CapacityConfig()

    def __post_init__(self) -> None:
        """Checks fields against each other."""
        require(
            1 <= self.num_experts <= 512,
            "moe.num_experts lies in 1..512",
            f"moe.num_experts={self.num_experts}",
            "Change it; for a dense model set moe.layer_period=0",
        )
        require(
            1 <= self.num_selected_experts <= self.num_experts,
            "moe.num_selected_experts lies in 1..num_experts",
            f"num_selected_experts={self.num_selected_experts}, num_experts={self.num_experts}",
            "Lower num_selected_experts or raise num_experts",
        )
        require_choice("moe.activation", self.activation, ACTIVATIONS)
        require_choice("moe.dispatch", self.dispatch, DISPATCHERS)
        require_choice("moe.exchange", self.exchange, EXCHANGES)
        require(
            self.dispatch != "ragged" or self.exchange != "compiler",
            "moe.dispatch='ragged' exchanges rows by explicit collectives",
            f"moe.exchange={self.exchange!r}",
            "Set moe.exchange='auto' or 'explicit'",
        )
        require_fraction("moe.expert_dropout_rate", self.expert_dropout_rate)
        require_positive("moe.init_scale", self.init_scale)
        for name, least in (
            ("expert_dim", 1), ("num_shared_experts", 0), ("group_size", 0),
            ("layer_period", 0), ("layer_offset", 0), ("num_dense_first", 0),
            ("exchange_chunks", 1), ("num_zero_experts", 0), ("num_copy_experts", 0),
        ):  # fmt: skip
            require_at_least(f"moe.{name}", getattr(self, name), least)
        require(
            self.layer_period == 0 or self.layer_offset < self.layer_period,
            "moe.layer_offset is a layer of the period",
            f"layer_offset={self.layer_offset}, layer_period={self.layer_period}",
            "Lower layer_offset; to keep the first layers dense set num_dense_first",
        )
        self._check_gates()
        self._check_groups()
        self._check_selection()
        check_balance(self)
        check_soft_slots(self)
        check_zero_computation(self)
        self._check_causality()
        self._check_evaluation()
        require(
            not self.shared_expert_gate or self.num_shared_experts > 0,
            "moe.shared_expert_gate needs moe.num_shared_experts > 0",
            f"num_shared_experts={self.num_shared_experts}",
            "Add a shared expert or drop the gate",
        )

    def _check_gates(self) -> None:
        constant = self.router.kind in ("token_choice", "sinkhorn") and (
            self.router.renormalize
            or (self.router.score == "softmax" and not self.router.score_before_topk)
        )
        require(
            self.num_options == 1 or self.num_selected_experts > 1 or not constant,
            "with moe.num_selected_experts=1 the gate is the router's own probability: "
            "renormalised, or as a softmax over the one selected logit, it is always 1 and the "
            "router gets no gradient from the task",
            f"router.renormalize={self.router.renormalize}, "
            f"router.score_before_topk={self.router.score_before_topk}",
            "Set renormalize=False and score_before_topk=True, or use more than one expert a token",
        )

    def _check_groups(self) -> None:
        groups, kept = self.router.num_expert_groups, self.router.num_selected_groups
        size, remainder = divmod(self.num_experts, groups)
        require(
            remainder == 0,
            "router.num_expert_groups divides moe.num_experts",
            f"num_expert_groups={groups}, num_experts={self.num_experts}",
            "Use a divisor",
        )
        require(
            kept * size >= self.num_selected_experts,
            "the selected groups hold at least moe.num_selected_experts experts",
            f"{kept} groups of {size} experts, num_selected_experts={self.num_selected_experts}",
            "Raise router.num_selected_groups",
        )
        require(
            groups == 1 or self.router.group_score == "max" or size >= 2,
            "router.group_score='top2_sum' needs groups of two experts or more",
            f"groups of {size}",
            "Use fewer groups or group_score='max'",
        )

    def _check_selection(self) -> None:
        require(
            self.router.kind == "token_choice" or self.balance.bias_update_rate == 0,
            "a selection bias needs a router that selects by scores",
            f"router.kind={self.router.kind!r}, "
            f"balance.bias_update_rate={self.balance.bias_update_rate}",
            "Set balance.bias_update_rate=0",
        )
        expert_choice = self.router.kind == "expert_choice"
        require(
            not expert_choice or self.capacity.train_factor > 0,
            "experts choose as many tokens as they have slots, so that expert choice needs a "
            "capacity",
            f"capacity.train_factor={self.capacity.train_factor}",
            "Set it above 0; the mean number of experts a token is it times num_selected_experts",
        )
        require(
            self.router.max_experts <= self.num_experts,
            "router.max_experts is at most moe.num_experts",
            f"max_experts={self.router.max_experts}, num_experts={self.num_experts}",
            "Lower it, or set it to 0 for no limit",
        )
        require(
            self.router.kind != "base" or self.num_selected_experts == 1,
            "a balanced assignment gives a token one expert",
            f"router.kind='base', num_selected_experts={self.num_selected_experts}",
            "Set num_selected_experts=1, or router.kind='sinkhorn'",
        )
        require(
            all(0 <= expert < self.num_experts for expert in self.router.hash_table),
            "router.hash_table has experts in 0..num_experts - 1",
            f"num_experts={self.num_experts}, hash_table={self.router.hash_table}",
            "Correct it",
        )
        require(
            self.router.selection == "best" or self.balance.bias_update_rate == 0,
            "router.selection draws experts by their probability, which a selection bias leaves "
            "alone",
            f"selection={self.router.selection!r}, "
            f"balance.bias_update_rate={self.balance.bias_update_rate}",
            "Set router.selection='best' or balance.bias_update_rate=0",
        )

    def _check_causality(self) -> None:
        causal = self.router.causality
        where = ", which sees them in training only" if causal.evaluation else ""
        require(
            self.allow_noncausal_routing or all(causal),
            "in a causal model the experts of a token must not depend on later tokens",
            f"router.kind={self.router.kind!r}{where}",
            "Use 'token_choice', or accept the leak with moe.allow_noncausal_routing=True",
        )
        order = self.capacity.queue_order
        require(
            self.router.predictor_loss_weight == 0
            or self.capacity.eval_factor == 0
            or order == "token_major",
            "router.predictor_loss_weight makes evaluation causal, which needs a causal queue too",
            f"predictor_loss_weight={self.router.predictor_loss_weight}, "
            f"capacity.queue_order={order!r}, capacity.eval_factor={self.capacity.eval_factor}",
            "Use queue_order='token_major', or eval_factor=0",
        )
        dropless = self.capacity.train_factor == self.capacity.eval_factor == 0
        require(
            self.allow_noncausal_routing
            or dropless
            or queue_is_causal(order, self.num_selected_experts),
            "in a causal model whether a token keeps its slot must not depend on later tokens",
            f"capacity.queue_order={order!r} with num_selected_experts={self.num_selected_experts}",
            "Use queue_order='token_major', or train_factor=0 and eval_factor=0 (dropless), or "
            "accept the leak with moe.allow_noncausal_routing=True",
        )

    @property
    def num_options(self) -> int:
        """What a router chooses among: E experts, and those that compute nothing."""
        return self.num_experts + self.num_zero_experts + self.num_copy_experts

    @property
    def has_soft_slots(self) -> bool:
        """Whether experts compute mixtures of tokens; a single expert computes the tokens."""
        return self.router.kind == "soft" and self.num_experts > 1

    def _check_evaluation(self) -> None:
        selected = self.eval_num_selected_experts
        require(
            selected == 0 or self.num_selected_experts <= selected <= self.num_experts,
            "moe.eval_num_selected_experts is 0, or lies in num_selected_experts..num_experts",
            f"eval_num_selected_experts={selected}, num_selected_experts="
            f"{self.num_selected_experts}, num_experts={self.num_experts}",
            "Set it to 0 for as many as in training",
        )
        require(
            selected == 0 or self.router.kind != "soft",
            "Soft MoE learns slots for num_selected_experts, and has them in evaluation too",
            f"eval_num_selected_experts={selected}",
            "Set it to 0",
        )
        try:
            self.in_evaluation()
        except ValueError as error:
            raise ValueError(
                f"with moe.eval_num_selected_experts={selected} evaluation is refused: {error}"
            ) from error

    def in_evaluation(self) -> "MoEConfig":
        """The settings of a block in evaluation, with its K where that is another."""
        if self.eval_num_selected_experts in (0, self.num_selected_experts):
            return self
        selected = self.eval_num_selected_experts
        return dataclasses.replace(self, num_selected_experts=selected, eval_num_selected_experts=0)

    @property
    def gated(self) -> bool:
        """Whether an expert is a GLU of three matrices."""
        return self.activation in GATED_ACTIVATIONS

    def moe_layers(self, num_layers: int) -> tuple[int, ...]:
        """The indices of the MoE layers among `num_layers`, in order."""
        if self.layers:
            return self.layers
        if self.layer_period == 0:
            return ()
        start = self.num_dense_first + self.layer_offset
        return tuple(range(start, num_layers, self.layer_period))
