"""Distillation: a student learns a teacher's probabilities, such as a dense model from an MoE."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.config import ExperimentConfig, InitFrom, OptimizerConfig, read_config, write_config
from moe_jax.config.check import require
from moe_jax.config.installed import require_local
from moe_jax.config.settings import setting
from moe_jax.models.capacity import without_capacity
from moe_jax.models.model import LanguageModel
from moe_jax.models.multi_token import NAME, without_modules
from moe_jax.moe.capacity import Capacity
from moe_jax.moe.part import MoE
from moe_jax.part import Part
from moe_jax.training.arrays import by_name, name_of
from moe_jax.training.init_from import Source, open_source, read_taken
from moe_jax.training.loss import Batch, CrossEntropy, Scored, Totals, TrainingLoss, call_of_batch
from moe_jax.training.placement import check_run, state_shardings
from moe_jax.training.state import abstract_state
from moe_jax.training.workdir import Record, recorded_run
from moe_jax.weights.low_rank import ADAPTERS


def soft_nats(student_BLV: jax.Array, teacher_BLV: jax.Array, temperature: float) -> jax.Array:
    """The divergence of a student's distribution from its teacher's, float32 [B, L], nats.

    temperature^2 * KL(teacher || student) of logits divided by the temperature. The square keeps
    the gradient about as large as at 1 (Hinton et al., arXiv:1503.02531, section 2.1). The
    cross-entropy with the teacher is this plus the teacher's entropy, which has no gradient.
    """
    log_teacher = jax.nn.log_softmax(teacher_BLV.astype(jnp.float32) / temperature)
    log_student = jax.nn.log_softmax(student_BLV.astype(jnp.float32) / temperature)
    difference_BLV = jnp.exp(log_teacher) * (log_teacher - log_student)
    return temperature**2 * jnp.sum(difference_BLV, axis=-1)


@dataclasses.dataclass(frozen=True)
class Distil(TrainingLoss):
    """A mix of hard targets from the text and soft targets from a teacher.

    loss = (1 - weight) * cross-entropy of the targets + weight * `soft_nats`. A weight of 0.25
    is the best mix of Switch Transformers (arXiv:2101.03961, table 6), which also starts the
    student from the teacher's parameters outside the experts, as `init_from` can. The teacher runs
    without dropout, noise and capacity, and its annealed settings have the values of its step.
    """

    # Workdir of the teacher's run, or of an imported model; the run records its content.
    teacher: str = setting("", changes_results=False)
    step: int | None = setting(None, at_least=0)  # of its checkpoint; None: the newest complete one
    weight: float = setting(0.25, at_least=0, at_most=1)  # of the soft targets
    temperature: float = setting(1.0, above=0)  # of both models, in the soft targets

    def check(self) -> None:
        """See `Settings`."""
        require_local("training.loss.teacher", self.teacher)

    def record(self) -> Record:
        """The record of the teacher in its workdir.

        Raises:
          ValueError: there is no teacher.
        """
        require(
            bool(self.teacher),
            "training.loss='distil' needs a teacher",
            "training.loss.teacher=''",
            "Set it to the workdir of a run or of an imported model",
        )
        record, _ = recorded_run(pathlib.Path(self.teacher), self.step)
        require(
            bool(record),
            "a teacher must be the workdir of a run or of an imported model",
            f"there is none in training.loss.teacher={self.teacher!r}",
            "Correct the path",
        )
        return record

    def model(self, trust: bool | frozenset[str]) -> Any:
        """The teacher's model without multi-token modules; `trust` as in `read_config`."""
        return without_modules(self._whole_model(trust))

    def _whole_model(self, trust: bool | frozenset[str]) -> Any:
        return read_config(self.record(), ExperimentConfig, trust=trust).model

    def of_teacher(self, config: ExperimentConfig) -> ExperimentConfig:
        """The teacher's model with the data, batch and mesh of the student's run.

        Raises:
          ValueError: there is no teacher, or it does not fit the run.
        """
        whole = self._whole_model(frozenset(write_config(config)["sources"]))
        model = without_modules(whole)
        require(
            model.vocab_size == config.model.vocab_size,
            "a teacher must have as many ids as its student",
            f"{model.vocab_size} in {self.teacher}, {config.model.vocab_size} here",
            f"Set model.vocab_size={model.vocab_size}, or use another teacher",
        )
        require(
            not without_capacity(model).looks_ahead(training=False),
            "a teacher must not see the tokens that it predicts",
            f"a part of the model in {self.teacher} looks ahead",
            "Use a teacher whose routers do not",
        )
        return dataclasses.replace(
            config,
            model=model,
            init_from=InitFrom(path=self.teacher, step=self.step, fresh=names_of_modules(whole)),
            # The run's may name parts that it does not have. Nothing of a teacher trains.
            optimizer=OptimizerConfig(
                warmup_steps=0, trainable=("all",) if model.adapters is None else (ADAPTERS,)
            ),
            training=dataclasses.replace(config.training, loss=CrossEntropy()),
        )

    def teachers(self, config: ExperimentConfig) -> tuple[ExperimentConfig, ...]:
        """See `TrainingLoss`; a plan reads training settings, so these are set as `share` runs."""
        teacher = self.of_teacher(config)
        return (dataclasses.replace(teacher, model=teacher.model.map_parts(_trained_as_run)),)

    def source(self, config: ExperimentConfig) -> Source:
        """The checkpoint of the teacher; matches all of its arrays, and reads none."""
        return open_source(self.of_teacher(config), self.record().get("content", {}))

    def content(self, config: ExperimentConfig, content: Mapping[str, str]) -> dict[str, str]:
        """See `TrainingLoss`: the hash of the teacher's checkpoint; checks its tokenizer."""
        known, given = self.record().get("content", {}).get("tokenizer"), content["tokenizer"]
        require(
            known in (None, given),
            "a teacher and its student must have the same tokenizer",
            f"sha256 {str(known)[:12]} in {self.teacher}, {given[:12]} here",
            "Set data.tokenizer to that of the teacher",
        )
        return {"teacher": self.source(config).sha256}

    def with_whole_paths(self) -> Self:
        """See `TrainingLoss`."""
        return dataclasses.replace(self, teacher=str(pathlib.Path(self.teacher).absolute()))

    def abstract_arrays(self, config: ExperimentConfig, mesh: Mesh) -> tuple[Any, ...]:
        """See `TrainingLoss`: parameters of the teacher, state of its parts, and its step."""
        teacher = self.of_teacher(config)
        check_run(teacher, mesh)
        abstract, placed = abstract_state(teacher), state_shardings(teacher, mesh)
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            (abstract.params, abstract.model_state, abstract.step),
            (placed.params, placed.model_state, placed.step),
        )

    def arrays(self, config: ExperimentConfig, mesh: Mesh) -> tuple[Any, ...]:
        """See `TrainingLoss`; reads averaged parameters where the teacher has them."""
        source, (params, state, step) = self.source(config), self.abstract_arrays(config, mesh)
        wanted = {"params": params, "model_state": state}
        taken = read_taken(source, by_name(wanted), mesh, averages=True)
        read = jax.tree_util.tree_map_with_path(lambda path, _: taken[name_of(path)], wanted)
        at_step = jax.device_put(np.asarray(source.step, step.dtype), step.sharding)
        return read["params"], read["model_state"], at_step

    def share(
        self, scored: Scored, microbatch: Batch, totals: Totals, arrays: tuple[Any, ...]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `TrainingLoss`; the metric is `soft_loss`, nats per target."""
        params, state, step = arrays
        model = self.model(trust=True)  # `of_teacher` has refused kinds that the run does not name
        output = model.run(params, call_of_batch(microbatch, capacity=0.0, step=step), state=state)
        soft_BL = soft_nats(scored.logits_BLV, output.logits_BLV, self.temperature)
        soft = jnp.sum(soft_BL * microbatch["loss_weights"]) / totals.loss_weight
        if not self.weight:
            return scored.cross_entropy, {"soft_loss": soft}
        share = (1 - self.weight) * scored.cross_entropy + self.weight * soft
        return share, {"soft_loss": soft}


def names_of_modules(model: LanguageModel) -> tuple[str, ...]:
    """The arrays of multi-token modules in a checkpoint, by the names of `models.selection`."""
    if model.multi_token is None:
        return ()
    return (NAME, *(name for name in model.state_specs() if name.startswith(NAME)))


def _trained_as_run(part: Part) -> Part:
    """A part with training settings that equal a forward pass without a capacity."""
    if not isinstance(part, MoE):
        return part
    part = dataclasses.replace(part, num_selected_experts=part.num_selected(training=False))
    if part.capacity_factor(training=False, factor=0.0):  # experts fill their slots
        return part
    return dataclasses.replace(part, capacity=Capacity(train_factor=0.0, eval_factor=0.0))
