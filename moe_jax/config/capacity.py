"""Settings of capacity: how many tokens an expert takes, and which."""

import dataclasses

from moe_jax.config.check import require, require_at_least, require_choice

QUEUE_ORDERS = ("token_major", "choice_major", "batch_prioritized", "probability", "random")


@dataclasses.dataclass(frozen=True)
class CapacityConfig:
    """How many slots an expert has in a group of tokens, and who gets them."""

    train_factor: float = 1.25  # slots over the mean load, in training; 0: dropless
    eval_factor: float = 2.0  # the same for the capacity-limited evaluation, beside the dropless
    preset: str = ""  # a system's rule and queue, from CAPACITY_PRESETS; "": the fields below
    per: str = "assignment"  # mean load counts K*tokens; "token": tokens; "choice": K * per token
    rounding: str = "ceil"  # of the product: "ceil", "floor", "nearest" (half to even)
    round_mean_up: bool = False  # round the mean load up before the factor is applied (MaxText)
    multiple_of: int = 1  # then up to a multiple of this
    minimum: int = 1  # and no fewer slots than this
    queue_order: str = "token_major"  # who is served first when an expert is full

    def __post_init__(self) -> None:
        """Checks the fields and fills in a preset."""
        require_choice("capacity.preset", self.preset, ("", *CAPACITY_PRESETS))
        if self.preset:
            self._fill_in_preset()
        require_choice("capacity.per", self.per, ("assignment", "token", "choice"))
        require_choice("capacity.rounding", self.rounding, ("ceil", "floor", "nearest"))
        require_choice("capacity.queue_order", self.queue_order, QUEUE_ORDERS)
        for name, least in (("multiple_of", 1), ("minimum", 1)):
            require_at_least(f"capacity.{name}", getattr(self, name), least)
        for name in ("train_factor", "eval_factor"):
            require_at_least(f"capacity.{name}", getattr(self, name), 0)
        require(
            self.queue_order != "random" or self.eval_factor == 0,
            "capacity.queue_order='random' draws from a key, which an evaluation has not",
            f"capacity.eval_factor={self.eval_factor}",
            "Set capacity.eval_factor=0: dropless evaluation only",
        )

    def _fill_in_preset(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, value in CAPACITY_PRESETS[self.preset].items():
            given = getattr(self, name)
            require(
                given in (defaults[name], value),
                f"capacity.preset={self.preset!r} sets capacity.{name}={value!r}",
                f"capacity.{name}={given!r} as well",
                f"Drop capacity.{name}, or the preset",
            )
            object.__setattr__(self, name, value)


# What each system computes, read from its source; the queue is the system's own. DeepSpeed's is of
# its top-2 gate: its top-1 gate serves tokens at random (queue_order="random").
CAPACITY_PRESETS: dict[str, dict[str, str | int | bool]] = {
    "mesh_tensorflow": {
        "per": "token", "rounding": "floor", "minimum": 4, "queue_order": "choice_major",
    },
    "flaxformer": {
        "per": "token", "rounding": "nearest", "minimum": 4, "queue_order": "choice_major",
    },
    "vmoe": {"rounding": "ceil", "multiple_of": 4, "queue_order": "choice_major"},
    "maxtext": {"rounding": "floor", "round_mean_up": True, "queue_order": "token_major"},
    "megatron": {"rounding": "ceil", "queue_order": "probability"},
    "deepspeed": {"rounding": "ceil", "minimum": 4, "queue_order": "choice_major"},
    "tutel": {
        "per": "choice", "rounding": "floor", "round_mean_up": True, "queue_order": "choice_major",
    },
    "megablocks": {"rounding": "floor", "queue_order": "token_major"},
    "olmo_core": {"rounding": "floor", "multiple_of": 8, "queue_order": "token_major"},
    "simply": {"per": "token", "rounding": "floor", "queue_order": "token_major"},
    "axlearn": {
        "per": "token", "rounding": "floor", "multiple_of": 4, "queue_order": "choice_major",
    },
}  # fmt: skip


def queue_is_causal(queue_order: str, num_selected_experts: int) -> bool:
    """Whether the slots of a token never depend on later tokens of its group.

    Token-major order serves tokens as they come. Choice-major order serves every first choice
    before any second choice, so with K > 1 a later token can evict an earlier one's second choice.
    The other orders rank tokens of the whole group against each other.
    """
    if queue_order == "choice_major":
        return num_selected_experts == 1
    return queue_order == "token_major"
