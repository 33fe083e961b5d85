"""The MoE block as a part: its settings, and what depends on them (legend: `moe_jax.moe`).

`block.moe_block` computes it.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from moe_jax.config.check import require
from moe_jax.config.settings import setting
from moe_jax.costs import Cost, Saving
from moe_jax.moe import statistics
from moe_jax.moe.activations import Activation, Relu
from moe_jax.moe.balance import BalanceLoss, RouterZ, by_settings, named_losses
from moe_jax.moe.bias import BiasUpdate
from moe_jax.moe.block import moe_block, tokens_per_group
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.costs import moe_costs, moe_savings
from moe_jax.moe.experts import Experts, FeedForward
from moe_jax.moe.load_balance import LoadBalance
from moe_jax.moe.routing import Options, Router
from moe_jax.moe.routing.token_choice import TokenChoice
from moe_jax.moe.run_experts.grouped_matmul import KERNELS
from moe_jax.moe.run_experts.plan import EXCHANGES, IMPLEMENTATIONS, plan_experts
from moe_jax.parameters import Axes, ParameterSpec, ffn_specs, truncated_normal_init, zeros
from moe_jax.part import Aux, Call, Dims, Output, Own, Part, RunShape, Sums, check_divides


@dataclasses.dataclass(frozen=True)
class MoE(Part):
    """The settings of a mixture-of-experts block; `moe_block` computes it.

    >>> import jax, jax.numpy as jnp
    >>> from moe_jax import Dims, MoE, init_parameters, moe_block
    >>> moe = MoE(num_experts=4, num_selected_experts=2, expert_dim=8)
    >>> params = init_parameters(jax.random.key(0), moe.specs(Dims(model_dim=16)))
    >>> y_BLM, aux = moe_block(params, jnp.ones((2, 6, 16)), moe)
    >>> y_BLM.shape, aux.sums["assigned_KE"].shape
    ((2, 6, 16), (2, 4))
    """

    routes: ClassVar[bool] = True
    pointwise: ClassVar[bool] = True  # if no token looks at others and none is dropped

    num_experts: int = setting(8, at_least=1, at_most=4096)  # E: routed experts
    num_selected_experts: int = setting(1, at_least=1)  # K: routed experts per token
    eval_num_selected_experts: int = setting(0, at_least=0)  # K in evaluation, if higher; 0: same
    num_zero_experts: int = setting(0, at_least=0)  # extra options that add nothing, at no cost
    num_copy_experts: int = setting(0, at_least=0)  # extra options that add the token, at no cost
    expert_dim: int = setting(512, at_least=1)  # H: hidden dim of one expert
    activation: Activation = Relu()  # "relu", "gelu": two matrices; "swiglu", "geglu": three
    use_bias: bool = False  # biases in the experts
    shared_expert_dim: int = setting(0, at_least=0)  # hidden dim of the shared expert; 0: none
    shared_expert_gate: bool = False  # scale the shared output by sigmoid(x . w) (Qwen)
    gate_on_input: bool = False  # gates multiply experts' inputs, not their outputs (Llama 4)
    expert_dropout_rate: float = setting(0.0, at_least=0, below=1)  # on hidden units (Switch: 0.4)
    init_scale: float = setting(1.0, above=0)  # variance of weights x fan-in (Switch: 0.1)
    identical_init: bool = False  # every expert starts from the same weights (V-MoE)
    group_size: int = setting(0, at_least=0)  # tokens that share a capacity; 0: one sequence
    router: Router = TokenChoice()  # maps tokens to experts and gates
    losses: tuple[BalanceLoss, ...] = (LoadBalance(weight=0.01), RouterZ())  # summed by weight
    bias: BiasUpdate | None = None  # loss-free balancing by a selection bias; None: no bias
    capacity: Capacity = Capacity()  # slots per expert, and which choices get them
    # How rows reach their experts; "auto": the fastest for the platform.
    run_experts: str = setting("auto", choices=IMPLEMENTATIONS, changes_results=False)
    # Kernel that multiplies sorted rows by weights; "auto": the best on the platform.
    grouped_matmul: str = setting("auto", choices=KERNELS, changes_results=False)
    # How rows move between devices: "compiler" by constraints, "explicit" by shard_map.
    exchange: str = setting("auto", choices=EXCHANGES, changes_results=False)
    # Chunks in which rows are exchanged: one is computed while the next is in transit.
    exchange_chunks: int = setting(1, at_least=1, changes_results=False)
    # Room for received rows, as a multiple of the mean per device, in the explicit exchange of
    # ragged rows; 0: room for the worst case. Rows that do not fit are lost, and counted as
    # `buffer_overflow`.
    buffer_factor: float = setting(0.0, at_least=0, changes_results=False)  # in training
    eval_buffer_factor: float = setting(0.0, at_least=0, changes_results=False)  # in evaluation
    stop_at_overflow: bool = setting(False, changes_results=False)  # end training with an error

    def check(self) -> None:
        """See `Settings`."""
        object.__setattr__(self, "losses", by_settings(self.losses))
        require(
            self.num_selected_experts <= self.num_experts,
            "num_selected_experts must lie in 1..num_experts",
            f"num_selected_experts={self.num_selected_experts}, num_experts={self.num_experts}",
            "Lower num_selected_experts or raise num_experts",
        )
        selected = self.eval_num_selected_experts
        require(
            selected == 0 or self.num_selected_experts <= selected <= self.num_experts,
            "eval_num_selected_experts must be 0, or lie in num_selected_experts..num_experts",
            f"eval_num_selected_experts={selected}, num_selected_experts="
            f"{self.num_selected_experts}, num_experts={self.num_experts}",
            "Set it to 0 to use the training value",
        )
        require(
            self.run_experts != "ragged" or self.exchange != "compiler",
            "run_experts='ragged' needs explicit collectives",
            f"exchange={self.exchange!r}",
            "Set exchange='auto' or 'explicit'",
        )
        self.check_buffer()
        require(
            not self.shared_expert_gate or self.shared_expert_dim > 0,
            "shared_expert_gate needs shared_expert_dim > 0",
            f"shared_expert_dim={self.shared_expert_dim}",
            "Add a shared expert or drop the gate",
        )
        require(
            self.num_options == self.num_experts or self.router.takes_zero_computation_experts,
            "zero and copy experts need a router in which tokens choose",
            f"num_zero_experts={self.num_zero_experts}, num_copy_experts={self.num_copy_experts}, "
            f"router={self.router}",
            "Set both to 0, or router='token_choice'",
        )
        self.router.check_block(self)
        for checked in (*self.losses, *(() if self.bias is None else (self.bias,))):
            checked.check_block(self)

    def check_buffer(self) -> None:
        """Checks the settings of the buffer of received rows."""
        for name in ("buffer_factor", "eval_buffer_factor"):
            factor = getattr(self, name)
            require(
                factor == 0 or factor >= 1,
                f"{name} must be 0 (room for the worst case) or at least 1 (for equal loads)",
                f"{name}={factor:g}",
                "Set it to 0, or to 1 or more",
            )
            require(
                factor == 0 or self.run_experts in ("auto", "ragged"),
                f"{name} is for run_experts='ragged': the others have a fixed number of slots",
                f"{name}={factor:g}, run_experts={self.run_experts!r}",
                f"Set run_experts='ragged', or {name}=0",
            )
        require(
            self.buffer_factor > 0 or not self.stop_at_overflow,
            "stop_at_overflow needs a buffer that can overflow",
            f"stop_at_overflow=True, buffer_factor={self.buffer_factor:g}",
            "Set buffer_factor to 1 or more, or stop_at_overflow=False",
        )

    @property
    def num_options(self) -> int:
        """The number of options of the router: E experts, and zero-computation experts."""
        return self.num_experts + self.num_zero_experts + self.num_copy_experts

    def num_selected(self, training: bool) -> int:
        """K, experts per token, in training or in evaluation."""
        return self.num_selected_experts if training else (
            self.eval_num_selected_experts or self.num_selected_experts
        )  # fmt: skip

    def capacity_factor(self, training: bool, factor: float | None = None) -> float:
        """The capacity factor, 0 if dropless; `factor`, if given, overrides the settings.

        A router that fills its slots keeps the factor of training in evaluation, also in a dropless
        one: with other slots, tokens would get another number of experts.
        """
        if self.fills_slots(training) and not factor:
            return self.capacity.train_factor
        if factor is None:
            return self.capacity.train_factor if training else self.capacity.eval_factor
        return factor

    def fills_slots(self, training: bool) -> bool:
        """Whether experts choose tokens until their slots are full; see `Router`."""
        return self.num_options > 1 and self.router.fills_slots(training)

    def options(self, group_size: int, training: bool, factor: float | None = None) -> Options:
        """The options of the router in groups of `group_size` tokens."""
        selected = self.num_selected(training)
        factor = self.capacity_factor(training, factor)
        slots = self.capacity.num_slots(group_size, self.num_options, selected, factor)
        return Options(self.num_experts, self.num_options, selected, slots, factor == 0)

    @property
    def spec_options(self) -> Options:
        """The options that specs of parameters and state may use: those of training.

        With `group_size=0` the number of slots is not known, and has no meaning here.
        """
        return self.options(self.group_size or 1, training=True)

    @property
    def experts(self) -> Experts:
        """The network of the routed experts."""
        return FeedForward(self.activation, self.expert_dropout_rate)

    def expert_axes(self, model_dim: int) -> dict[str, Axes]:
        """Names of the dims of each expert weight."""
        return {name: spec.axes for name, spec in self.expert_specs(Dims(model_dim)).items()}

    def expert_specs(self, dims: Dims) -> dict[str, ParameterSpec]:
        """The weights of `experts`, by name, with a leading E.

        Each weight of three dims is a matrix that multiplies every row once; costs rely on this.
        """
        return ffn_specs(
            dims.model_dim, self.expert_dim, "experts", gated=self.activation.gated,
            use_bias=self.use_bias, init_scale=self.init_scale, num_experts=self.num_experts,
            identical_init=self.identical_init,
        )  # fmt: skip

    def specs(self, dims: Dims) -> dict[str, Any]:
        """`experts` with a leading E; `router` if there is a choice; `shared`, with its `gate`."""
        specs: dict[str, Any] = {"experts": self.expert_specs(dims)}
        router = self.router.specs(dims, self.spec_options) if self.num_options > 1 else {}
        specs |= {"router": router} if router else {}
        if self.shared_expert_dim > 0:
            component = "shared_experts"
            specs["shared"] = ffn_specs(
                dims.model_dim, self.shared_expert_dim, component, gated=self.activation.gated,
                use_bias=self.use_bias, init_scale=self.init_scale,
            )  # fmt: skip
            if self.shared_expert_gate:
                init = truncated_normal_init(0.02)
                gate = ParameterSpec((dims.model_dim, 1), ("model", None), init, component)
                specs["shared"]["gate"] = gate
        return specs

    def state_specs(self, dims: Dims) -> dict[str, Any]:
        """`bias_E`, the selection bias of loss-free balancing; `router`, if it has a state."""
        specs: dict[str, Any] = {}
        if self.bias is not None:
            specs["bias_E"] = ParameterSpec((self.num_options,), (None,), zeros, "router", False)
        router = self.router.state_specs(dims, self.spec_options) if self.num_options > 1 else {}
        return specs | ({"router": router} if router else {})

    def looks_ahead(self, training: bool) -> bool:
        """See `Part`: through its router, a queue that can drop choices, or a bounded buffer.

        The rows that a buffer loses depend on all tokens of a batch. With `stop_at_overflow`,
        training ends with an error instead of losing rows.
        """
        if self.num_options > 1 and self.router.looks_ahead(training):
            return True
        if self.buffer_loses(training):
            return True
        num_choices = self.router.num_choices(self.options(self.group_size or 1, training))
        can_drop = self.capacity_factor(training) > 0
        return can_drop and self.capacity.queue.looks_ahead(num_choices=num_choices)

    def buffer_loses(self, training: bool) -> bool:
        """Whether a bounded buffer can lose rows, in training or in evaluation."""
        if training:
            return self.buffer_factor > 0 and not self.stop_at_overflow
        return self.eval_buffer_factor > 0

    def apply(self, params: Any, x_BLM: jax.Array, call: Call, own: Own) -> Output:
        """See `Part` and `moe_block`."""
        return *moe_block(params, x_BLM, self, call, own), None

    def next_state(self, state: Any, sums: Sums, step: jax.Array, num_steps: int) -> Any:
        """See `Part`: the bias and the router's state after a step."""
        following = dict(state)
        if self.bias is not None:
            following["bias_E"] = self.bias.update(
                state["bias_E"], jnp.sum(sums["assigned_KE"], axis=-2), sums["bias"],
                self.bias.rate_at(step, num_steps), self.num_selected_experts,
            )  # fmt: skip
        if "router" in state:
            following["router"] = self.router.next_state(state["router"], sums, step, num_steps)
        return following

    def steps_independent_of_length(self, num_steps: int) -> float:
        """See `Part`: the rate of the bias decides."""
        return math.inf if self.bias is None else self.bias.steps_independent_of_length(num_steps)

    @property
    def has_capacity(self) -> bool:
        """See `Part`; False for a router that fills its slots: all evaluations have the same."""
        return self.capacity.eval_factor > 0 and not self.fills_slots(training=False)

    @property
    def depends_on_microbatches(self) -> bool:
        """See `Part`; the rows that a bounded buffer loses depend on them too."""
        by_loss = any(loss.weight > 0 and loss.depends_on_microbatches for loss in self.losses)
        return by_loss or self.buffer_loses(training=True)

    @property
    def needs_batch_sums(self) -> bool:
        """See `Part`."""
        return any(loss.weight > 0 and loss.needs_batch_sums for loss in self.losses)

    def loss(self, aux: Aux, num_tokens: jax.Array, batch: Sums | None) -> jax.Array | float:
        """See `Part`: the balance losses, plus the router's own loss per token."""
        total = jnp.mean(aux.sums["router_loss"]) / num_tokens
        for name, loss in named_losses(self.losses):
            sums = {**aux.sums["losses"][name], **aux.sequences["losses"][name]}
            of_batch = None if batch is None else batch["losses"][name]
            if loss.weight > 0:
                total += loss.weight * loss.loss(sums, num_tokens, of_batch)
        return total

    def metrics(self, aux: Aux) -> dict[str, jax.Array]:
        """See `Part`: metrics of the routing and the router; unweighted balance losses by layer."""
        num_tokens = jnp.maximum(aux.sums["num_tokens"][0], 1).astype(jnp.float32)
        metrics = statistics.routing_metrics(aux)
        metrics |= self.router.metrics(aux) if self.num_options > 1 else {}
        for name, loss in named_losses(self.losses):
            metrics[name] = loss.by_layer(aux.sums["losses"][name], num_tokens)
        return metrics | {"router_loss": aux.sums["router_loss"] / num_tokens}

    def resolved(self, dtype: str, in_prefix: bool = False) -> Part:
        """See `Part`: fixes how experts run; a router that mixes tokens has one implementation."""
        if self.run_experts != "auto" or self.router.mixes:
            return self
        plan = plan_experts(self)
        if plan.rows == "ragged":
            return dataclasses.replace(self, run_experts="ragged", exchange="auto")
        return dataclasses.replace(
            self, run_experts=plan.rows, buffer_factor=0.0, eval_buffer_factor=0.0,
            stop_at_overflow=False,
        )  # fmt: skip

    def costs(self, dims: Dims, length: int, dtype: str) -> tuple[Cost, ...]:
        """See `Part` and `moe_costs`."""
        return moe_costs(self, dims, length, dtype)

    def decode_flops(self, dims: Dims, length: int, dtype: str) -> float:
        """See `Part`: with the K of evaluation."""
        selected = self.num_selected(training=False)
        moe = dataclasses.replace(self, num_selected_experts=selected, eval_num_selected_experts=0)
        return sum(cost.flops for cost in moe.costs(dims, length, dtype))

    def savings(self) -> Iterable[Saving]:
        """See `Part`."""
        return moe_savings(self)

    def check_run(self, dims: Dims, run: RunShape) -> None:
        """See `Part`: groups must fit the batch and its split over devices."""
        self.router.check_run(self, run)
        tokens_per_group(run.sequences, run.length, self.group_size)
        check_divides(self.specs(dims), run)
        per_group = max(self.group_size // run.length, 1)
        require(
            run.sequences % (run.shards["group"] * per_group) == 0,
            "a microbatch must split over slices * data * fsdp * expert devices, in whole "
            "sequences and whole groups of group_size tokens",
            f"{run.sequences} sequences, {per_group} per group, over {run.shards['group']} devices",
            f"Use a multiple of {run.shards['group'] * per_group} sequences per microbatch",
        )
