"""Settings of a run: data, optimizer, training, evaluation."""

import dataclasses
from typing import Any, NamedTuple

from moe_jax.config.check import require
from moe_jax.config.installed import require_local
from moe_jax.config.kinds import load_kind
from moe_jax.config.mesh import MeshConfig
from moe_jax.config.settings import Bounds, Settings, setting

TRACKERS = ("tensorboard", "csv", "wandb")
# The settings of `OptimizerConfig` that only some optimizers or schedules use.
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adamw": ("b1", "b2", "epsilon"),
    "adafactor": (),
    "lion": ("b1", "b2"),
    "muon": ("b1", "b2", "epsilon", "momentum", "ns_steps", "match_adamw", "adamw_share"),
    "schedule_free": ("b1", "b2", "epsilon"),
}
SCHEDULES: dict[str, tuple[str, ...]] = {
    "constant": (),
    "cosine": ("final_fraction",),
    "linear": ("final_fraction",),
    "rsqrt": (),
    "wsd": ("final_fraction", "decay_fraction"),
}


def default_loss() -> Any:
    """The cross-entropy of the targets."""
    return load_kind("loss", "cross_entropy")()


def default_objective() -> Any:
    """Prediction of the next token."""
    return load_kind("objective", "causal_lm")()


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """Where the text comes from and how it becomes sequences."""

    corpus: str = "embedded"  # "embedded", a path, "packed:DIR", "tfds:NAME", "KIND:PATH"
    text_field: str = ""  # with the text of a corpus record; "": "text"
    id_field: str = ""  # with the name of a document; "": "id", if there is one
    group_field: str = ""  # of documents held out together; "": "group", if there is one
    # "byte", the path of a .model, tokenizer.json or .tiktoken file, or "KIND:PATH"
    tokenizer: str = "byte"
    bos_token: str = ""  # begins a document; "": the usual one of the tokenizer
    eos_token: str = ""  # ends a document; "": the usual one of the tokenizer
    sequence_length: int = setting(256, at_least=2)  # L, tokens
    domain_weights: tuple[tuple[str, float], ...] = ()  # share per domain; (): by its tokens
    # "causal_lm", "prefix_lm", "span_corruption", "encoder_prefix_lm", "supervised",
    # "encoder_supervised", or one of these with its settings
    objective: Any = dataclasses.field(
        default_factory=default_objective, metadata={"family": "objective"}
    )
    heldout_fraction: float = setting(0.03, above=0, below=1)  # of the documents, never trained on
    seed: int = setting(0, at_least=0, below=2**32)  # of the order of the sequences
    # Of token files; "": the user's cache directory.
    cache_dir: str = setting("", changes_results=False)

    def check(self) -> None:
        """See `Settings`."""
        for name in ("corpus", "tokenizer", "cache_dir"):
            value = getattr(self, name)
            require_local(f"data.{name}", value)
            require(
                "\0" not in value,
                f"data.{name} must not contain a NUL byte",
                f"data.{name}={value!r}",
                "Correct it",
            )
            require(
                bool(value) or name == "cache_dir",
                f"data.{name} must not be empty",
                f"data.{name}={value!r}",
                "Set it, for example to "
                + ("'embedded' or the path of a folder" if name == "corpus" else "'byte'"),
            )
        names = [name for name, _ in self.domain_weights]
        require(
            len(set(names)) == len(names),
            "data.domain_weights must name each domain once",
            f"data.domain_weights={self.domain_weights}",
            "Add the weights up",
        )
        require(
            all(Bounds(above=0).allow(weight) for _, weight in self.domain_weights),
            "data.domain_weights must be positive and finite",
            f"data.domain_weights={self.domain_weights}",
            "Leave a domain out to give it no weight",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Settings):
    """The optimizer and the schedule of its learning rate.

    A setting that the chosen optimizer or schedule does not use must keep its default. The specs of
    parameters decide which of them decay and which are matrices; see `training.optimizers`.
    """

    name: str = setting("adamw", choices=tuple(OPTIMIZERS))
    learning_rate: float = setting(1e-3, above=0)  # peak
    schedule: str = setting("cosine", choices=tuple(SCHEDULES))  # after warm-up
    warmup_steps: int = setting(100, at_least=0)  # the last of them uses the peak
    # Until then: linear from 0, or constant at the peak (T5).
    warmup: str = setting("linear", choices=("linear", "constant"))
    final_fraction: float = setting(0.1, at_least=0, at_most=1)  # of the peak, at the last step
    decay_fraction: float = setting(0.2, above=0, at_most=1)  # wsd: of all steps, at the end
    b1: float = setting(0.9, at_least=0, below=1)  # decay of the first moment
    # Decay of the second moment; lion: of its only moment.
    b2: float = setting(0.95, at_least=0, below=1)
    epsilon: float = setting(1e-8, above=0)  # added to the root of the second moment
    momentum: float = setting(0.95, at_least=0, below=1)  # muon: decay of a matrix's momentum
    ns_steps: int = setting(5, at_least=1, at_most=20)  # muon: iterations of Newton-Schulz
    match_adamw: bool = True  # muon: scaled to AdamW's learning rate (arXiv:2502.16982) or Jordan's
    adamw_share: float = setting(1.0, above=0)  # muon: of the learning rate, for non-matrices
    weight_decay: float = setting(0.1, at_least=0)  # decoupled, on matrices only
    clip_value: float = setting(0.0, at_least=0)  # of each entry of the gradient; 0: no clipping
    clip_norm: float = setting(1.0, at_least=0)  # global norm, after clip_value; 0: no clipping
    ema_decay: float = setting(0.0, at_least=0, below=1)  # of parameters to evaluate; 0: no average
    # What trains, by the names of `models.selection`: "experts", "attention", "encoder/router".
    trainable: tuple[str, ...] = ("all",)
    frozen: tuple[str, ...] = ()  # exceptions from `trainable`, such as "router", "embedding"
    # Factors of learning rate and weight decay, such as (("router", 0.1),); (): 1 for all.
    learning_rates: tuple[tuple[str, float], ...] = ()

    def check(self) -> None:
        """See `Settings`."""
        require(
            bool(self.trainable),
            "optimizer.trainable must name what trains",
            "optimizer.trainable=()",
            "Name a part, or 'all'",
        )
        require(
            all(Bounds(above=0).allow(factor) for _, factor in self.learning_rates),
            "optimizer.learning_rates must be positive and finite",
            f"optimizer.learning_rates={self.learning_rates}",
            "Name a part in optimizer.frozen to keep it as it is",
        )
        self.check_used("name", OPTIMIZERS)
        self.check_used("schedule", SCHEDULES)
        require(
            self.schedule != "rsqrt" or self.warmup_steps > 0,
            "optimizer.schedule='rsqrt' needs a warm-up, from whose end it decays",
            f"optimizer.warmup_steps={self.warmup_steps}",
            "Set warmup_steps to at least 1",
        )
        if self.name == "schedule_free":
            require(
                self.schedule == "constant",
                "optimizer.name='schedule_free' needs a constant learning rate after the warm-up",
                f"optimizer.schedule={self.schedule!r}",
                "Set optimizer.schedule='constant'",
            )
            require(
                self.ema_decay == 0 and self.b1 > 0,
                "optimizer.name='schedule_free' needs b1 above 0 for its average of parameters, "
                "and no second average",
                f"b1={self.b1}, ema_decay={self.ema_decay}",
                "Set ema_decay=0 and b1=0.9",
            )

    @property
    def chosen(self) -> tuple[str, ...]:
        """The names in `trainable` and `frozen`, and of groups with their own learning rate."""
        return (*self.trainable, *self.frozen, *(name for name, _ in self.learning_rates))

    def check_used(self, chooser: str, table: dict[str, tuple[str, ...]]) -> None:
        """Refuses a setting that the chosen optimizer or schedule ignores.

        Args:
          chooser: the setting that chooses.
          table: the settings that each choice uses.

        Raises:
          ValueError: with the choices that use the setting.
        """
        chosen = getattr(self, chooser)
        for field in dataclasses.fields(self):
            have = [choice for choice, names in table.items() if field.name in names]
            value = getattr(self, field.name)
            require(
                not have or chosen in have or value == field.default,
                f"optimizer.{field.name} is a setting of optimizer.{chooser} {', '.join(have)}",
                f"{chooser}={chosen!r}, {field.name}={value!r}",
                f"Leave it out, or change optimizer.{chooser}",
            )


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Settings):
    """Length, batch size and loss of training, and when results are written."""

    num_steps: int = setting(1000, at_least=1)  # optimizer steps in all
    batch_size: int = setting(16, at_least=1)  # sequences a step, over all devices
    num_microbatches: int = setting(1, at_least=1)  # parts of a batch; more need less memory
    # Chunks of positions; only the logits of one exist at a time, and training computes them twice.
    logits_chunks: int = setting(1, at_least=1, changes_results=False)
    # "cross_entropy", "cross_entropy_z", "distil", or one of these with its settings
    loss: Any = dataclasses.field(default_factory=default_loss, metadata={"family": "loss"})
    # Where metrics are written, in addition to metrics.jsonl.
    trackers: tuple[str, ...] = setting(("tensorboard",), choices=TRACKERS, changes_results=False)
    # Steps; a row of metrics is of that step's batch alone, not a mean since the row before.
    log_every: int = setting(10, at_least=1, changes_results=False)
    # Steps; also after the last step; 0: never.
    evaluate_every: int = setting(500, at_least=0, changes_results=False)
    # Held-out batches of `batch_size` sequences to score before the last step; 0: all.
    evaluation_batches: int = setting(0, at_least=0, changes_results=False)
    # Steps; also before every evaluation and after the last step.
    checkpoint_every: int = setting(200, at_least=1, changes_results=False)
    keep_checkpoints: int = setting(2, at_least=1, changes_results=False)  # number of the newest
    # Checkpoints at multiples of this step stay for good; 0: none.
    keep_every: int = setting(0, at_least=0, changes_results=False)
    # A prompt to continue at the end of a run; "": no sample.
    sample_prompt: str = setting("The ", changes_results=False)
    sample_tokens: int = setting(200, at_least=0, changes_results=False)  # maximum
    # First and last step to trace; (): none.
    profile_steps: tuple[int, ...] = setting((), at_least=1, changes_results=False)

    @property
    def evaluation_microbatches(self) -> int:
        """`evaluation_batches`, counted in the microbatches that an evaluation reads; 0: all."""
        return self.evaluation_batches * self.num_microbatches

    def check(self) -> None:
        """See `Settings`."""
        require(
            self.batch_size % self.num_microbatches == 0,
            "training.num_microbatches must divide training.batch_size",
            f"batch_size={self.batch_size}, num_microbatches={self.num_microbatches}",
            "Use a divisor",
        )
        require(
            self.logits_chunks == 1 or self.loss.takes_chunks,
            "training.logits_chunks above 1 needs a training loss that declares takes_chunks",
            f"logits_chunks={self.logits_chunks}, loss={self.loss}",
            "Set logits_chunks=1, and raise num_microbatches to lower the memory of logits",
        )
        require(
            self.keep_every % self.checkpoint_every == 0,
            "training.keep_every must be a multiple of training.checkpoint_every",
            f"keep_every={self.keep_every}, checkpoint_every={self.checkpoint_every}",
            "Use a multiple",
        )
        require(
            not self.profile_steps
            or (
                len(self.profile_steps) == 2
                and self.profile_steps[0] <= self.profile_steps[1] <= self.num_steps
            ),
            "training.profile_steps must be the first and the last step to trace",
            f"profile_steps={self.profile_steps}, num_steps={self.num_steps}",
            "Pass two steps of the run, such as (10, 12)",
        )


@dataclasses.dataclass(frozen=True)
class InitFrom(Settings):
    """The checkpoint from which a run starts, in place of newly drawn parameters.

    It is read once: a run with its own checkpoint continues from that one.
    """

    path: str = ""  # workdir of a run, or of an imported model; "": none
    step: int | None = setting(None, at_least=0)  # of a checkpoint; None: the newest complete one
    optimizer_state: bool = False  # carry the optimizer moments too
    data_position: bool = False  # continue at that step: in the data, the schedules and the noise
    fresh: tuple[str, ...] = ()  # parameters to draw anew, by the names of `models.selection`

    def check(self) -> None:
        """See `Settings`."""
        fields = dataclasses.fields(self)
        require_local("init_from.path", self.path)
        require(
            "\0" not in self.path,
            "init_from.path must not contain a NUL byte",
            f"init_from.path={self.path!r}",
            "Correct it",
        )
        require(
            bool(self.path) or all(getattr(self, f.name) == f.default for f in fields),
            "init_from needs a path if it has other settings",
            f"{self}",
            "Set init_from.path to the workdir of a run",
        )


class Lengths(NamedTuple):
    """Tokens per sequence in the stacks of a model.

    Attributes:
      decoder: L, in the stack whose output the head reads.
      encoder: T, in an encoder; 0 without one.
    """

    decoder: int
    encoder: int = 0

    def of(self, stack: str) -> int:
        """The length in the stack with this name in `LanguageModel.stacks`."""
        return self.encoder if stack == "encoder" else self.decoder


def default_model() -> Any:
    """The language model with its default settings."""
    return load_kind("model", "language_model")()


@dataclasses.dataclass(frozen=True)
class ExperimentConfig(Settings):
    """All settings of a run; equal configs give equal runs."""

    name: str = setting("experiment", changes_results=False)  # in reports and comparisons
    seed: int = setting(0, at_least=0, below=2**32)  # of parameters, dropout and router noise
    # Parts, stack and head.
    model: Any = dataclasses.field(default_factory=default_model, metadata={"family": "model"})
    data: DataConfig = dataclasses.field(default_factory=DataConfig)  # text and objective
    optimizer: OptimizerConfig = OptimizerConfig()
    # Length, batch size and loss.
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    init_from: InitFrom = InitFrom()  # a checkpoint to start from
    mesh: MeshConfig = setting(MeshConfig(), changes_results=False)

    def check(self) -> None:
        """Checks settings of different sections against each other."""
        self.data.objective.check_model(self.model)
        self.model.check_trained(self.optimizer)
        require(
            self.optimizer.schedule in ("constant", "rsqrt")  # the start of a longer run
            or self.optimizer.warmup_steps <= self.training.num_steps,
            f"optimizer.schedule={self.optimizer.schedule!r} must warm up within the run",
            f"warmup_steps={self.optimizer.warmup_steps}, num_steps={self.training.num_steps}",
            f"Set optimizer.warmup_steps to at most {self.training.num_steps}",
        )
        stable = self.training.num_steps * (1 - self.optimizer.decay_fraction)
        require(
            self.optimizer.schedule != "wsd" or self.optimizer.warmup_steps <= stable,
            "optimizer.schedule='wsd' must warm up before it decays",
            f"warmup_steps={self.optimizer.warmup_steps}, num_steps={self.training.num_steps}, "
            f"decay_fraction={self.optimizer.decay_fraction}",
            "Lower warmup_steps or decay_fraction",
        )

    @property
    def lengths(self) -> Lengths:
        """Tokens per sequence in each stack of the model."""
        lengths = self.data.objective.lengths(self.data.sequence_length)
        return Lengths(lengths.decoder, lengths.encoder)

    def on_devices(self, num_devices: int) -> "ExperimentConfig":
        """This experiment with its mesh filled for `num_devices` devices.

        Raises:
          ValueError: the mesh does not fit the devices.
        """
        return dataclasses.replace(self, mesh=self.mesh.fill(num_devices))
