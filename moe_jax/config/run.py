"""Settings of a run: data, optimizer, training, evaluation."""

import dataclasses
import math
from typing import Any

from moe_jax.config.check import require
from moe_jax.config.kinds import load_kind
from moe_jax.config.mesh import MeshConfig
from moe_jax.config.settings import Settings, setting

OBJECTIVES = ("causal_lm",)
OPTIMIZERS = ("adamw", "adafactor")
TRACKERS = ("tensorboard", "csv", "wandb")
SCHEDULES = ("constant", "cosine", "linear", "rsqrt")


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """Where the text comes from and how it becomes sequences."""

    corpus: str = "embedded"  # "embedded", the path of a file or folder, "tfds:NAME"
    text_field: str = ""  # of a record of the corpus; "": "text"
    id_field: str = ""  # that names a document; "": "id", where there is one
    group_field: str = ""  # of what is held out together; "": "group", where there is one
    tokenizer: str = "byte"  # "byte", the path of a .model, tokenizer.json or .tiktoken file
    bos_token: str = ""  # begins a document; "": the usual one of the tokenizer
    eos_token: str = ""  # ends a document; "": the usual one of the tokenizer
    sequence_length: int = setting(256, at_least=2)  # L, tokens
    domain_weights: tuple[tuple[str, float], ...] = ()  # share of each domain; (): by its tokens
    objective: str = setting("causal_lm", choices=OBJECTIVES)
    heldout_fraction: float = setting(0.03, above=0, below=1)  # of the documents, never trained on
    seed: int = setting(0, at_least=0, below=2**32)  # of the order of the sequences
    # Of token files; "": the user's cache directory.
    cache_dir: str = setting("", changes_results=False)

    def check(self) -> None:
        """See `Settings`."""
        for name in ("corpus", "tokenizer", "cache_dir"):
            value = getattr(self, name)
            require(
                "://" not in value and "\0" not in value,
                f"data.{name} is on a file system: buckets and URLs are not read yet",
                f"data.{name}={value!r}",
                "Copy or mount it, and give that path",
            )
            require(
                bool(value) or name == "cache_dir",
                f"data.{name} is not empty",
                f"data.{name}={value!r}",
                "Set it, for example to "
                + ("'embedded' or the path of a folder" if name == "corpus" else "'byte'"),
            )
        names = [name for name, _ in self.domain_weights]
        require(
            len(set(names)) == len(names),
            "data.domain_weights names each domain once",
            f"data.domain_weights={self.domain_weights}",
            "Add the weights up",
        )
        require(
            all(0 < weight < math.inf for _, weight in self.domain_weights),
            "data.domain_weights are positive and finite",
            f"data.domain_weights={self.domain_weights}",
            "Leave a domain out to give it no weight",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Settings):
    """The optimizer and the schedule of its learning rate."""

    name: str = setting("adamw", choices=OPTIMIZERS)
    learning_rate: float = setting(1e-3, above=0)  # peak
    schedule: str = setting("cosine", choices=SCHEDULES)  # after warm-up
    warmup_steps: int = setting(100, at_least=0)  # linear from 0
    final_fraction: float = setting(0.1, at_least=0, at_most=1)  # of the peak, at the last step
    b1: float = setting(0.9, at_least=0, below=1)  # decay of the first moment
    b2: float = setting(0.95, at_least=0, below=1)  # decay of the second moment
    epsilon: float = setting(1e-8, above=0)
    weight_decay: float = setting(0.1, at_least=0)  # decoupled, on matrices only
    clip_norm: float = setting(1.0, at_least=0)  # global norm of the gradient; 0: no clipping

    def check(self) -> None:
        """See `Settings`."""
        require(
            self.schedule != "rsqrt" or self.warmup_steps > 0,
            "optimizer.schedule='rsqrt' decays from the end of the warm-up",
            f"optimizer.warmup_steps={self.warmup_steps}",
            "Set warmup_steps to at least 1",
        )


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Settings):
    """How long, on how much at once, and what is written when."""

    num_steps: int = setting(1000, at_least=1)
    batch_size: int = setting(16, at_least=1)  # sequences a step, over all devices
    num_microbatches: int = setting(1, at_least=1)  # the batch is cut into so many: less memory
    # What shows the metrics beside metrics.jsonl.
    trackers: tuple[str, ...] = setting(("tensorboard",), choices=TRACKERS, changes_results=False)
    log_every: int = setting(10, at_least=1, changes_results=False)  # steps
    # Steps, and after the last; 0: never.
    evaluate_every: int = setting(500, at_least=0, changes_results=False)
    # Held-out batches to use before the last step; 0: all.
    evaluation_batches: int = setting(0, at_least=0, changes_results=False)
    # Steps; also before every evaluation and after the last step.
    checkpoint_every: int = setting(200, at_least=1, changes_results=False)
    keep_checkpoints: int = setting(2, at_least=1, changes_results=False)
    # Continued at the end of a run; "": no sample.
    sample_prompt: str = setting("The ", changes_results=False)
    sample_tokens: int = setting(200, at_least=0, changes_results=False)

    def check(self) -> None:
        """See `Settings`."""
        require(
            self.batch_size % self.num_microbatches == 0,
            "training.num_microbatches divides training.batch_size",
            f"batch_size={self.batch_size}, num_microbatches={self.num_microbatches}",
            "Use a divisor",
        )


def default_model() -> Any:
    """The language model at its defaults."""
    return load_kind("model", "language_model")()


@dataclasses.dataclass(frozen=True)
class ExperimentConfig(Settings):
    """Everything a run depends on; equal configs give equal runs."""

    name: str = setting("experiment", changes_results=False)
    seed: int = setting(0, at_least=0, below=2**32)  # of parameters, dropout and router noise
    model: Any = dataclasses.field(default_factory=default_model, metadata={"family": "model"})
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = setting(MeshConfig(), changes_results=False)

    def check(self) -> None:
        """Checks settings of different sections against each other."""
        require(
            self.data.objective != "causal_lm" or self.model.stack.causal,
            "the next token is no objective for a model that sees it",
            f"data.objective={self.data.objective!r}, model.stack.causal=False",
            "Set model.stack.causal=True",
        )
        require(
            self.optimizer.warmup_steps <= self.training.num_steps,
            "optimizer.warmup_steps is at most training.num_steps",
            f"warmup_steps={self.optimizer.warmup_steps}, num_steps={self.training.num_steps}",
            "Shorten the warm-up",
        )

    def on_devices(self, num_devices: int) -> "ExperimentConfig":
        """This experiment with its mesh filled for so many devices.

        Raises:
          ValueError: the mesh does not fit the devices.
        """
        return dataclasses.replace(self, mesh=self.mesh.fill(num_devices))
