"""Code shared by commands that make one model from another: source, check, new directory."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from moe_jax.config import ExperimentConfig, InitFrom, MeshConfig, read_config
from moe_jax.config.check import require
from moe_jax.data.tokenizers import form_and_path
from moe_jax.files import require_absent, whole_or_absent
from moe_jax.finetune.moments import remodelled_optimizer
from moe_jax.finetune.preservation import (
    TOLERANCE,
    Batch,
    Outputs,
    check_preserved,
    difference,
    heldout_text,
)
from moe_jax.finetune.remodel import Remodel, remodelled, remodelled_state
from moe_jax.models.wrapping import require_plain
from moe_jax.parallel.mesh import make_mesh
from moe_jax.training.imported import (
    INHERITED,
    TOKENIZER,
    copy_tokenizer,
    inherited,
    origin_of_run,
    save_state,
)
from moe_jax.training.placement import inference_rows
from moe_jax.training.saved import load_run
from moe_jax.training.state import TrainState
from moe_jax.training.workdir import recorded_run


@dataclasses.dataclass
class Source:
    """A model from which another is made.

    Attributes:
      workdir: of its run.
      config: of the run.
      state: its arrays; they are deleted as soon as the new model no longer needs them.
      mesh: of the arrays.
      batches: text on which the models are compared.
      outputs: of the model on this text.
    """

    workdir: pathlib.Path
    config: ExperimentConfig
    state: TrainState
    mesh: Mesh
    batches: Sequence[Batch]
    outputs: Outputs


def open_source(
    workdir: pathlib.Path,
    output: pathlib.Path,
    mesh: MeshConfig | None = None,
    step: int | None = None,
    *,
    trust: bool = False,
    moments: bool = False,
    num_batches: int = 1,
    check: Callable[[ExperimentConfig], object] | None = None,
) -> Source:
    """Loads a model and runs it on held-out text.

    Args:
      workdir: of its run.
      output: the directory of the new model, which must not exist.
      mesh: of both models; None: one device.
      step: of the checkpoint; None: the newest.
      trust: see `load_run`.
      moments: see `load_run`.
      num_batches: of text.
      check: is called with the config before arrays are read, and raises if no model can be made.

    Raises:
      ValueError: `output` exists, the run cannot be read, or its weights are not plain.
    """
    require_absent(output)
    record, _ = recorded_run(workdir, step)
    if record:  # without one, `load_run` refuses the directory
        recorded = read_config(record, ExperimentConfig, trust=trust)
        require_plain(recorded.model)
        if check is not None:
            check(recorded)
    config, state = load_run(workdir, mesh, step, trust=trust, moments=moments)
    placed_on = make_mesh(config.mesh)
    batches = heldout_text(workdir, config, placed_on, num_batches)
    outputs = Outputs(config, state.params, state.model_state, batches, placed_on, state.step)
    return Source(workdir, config, state, placed_on, batches, outputs)


def make(
    source: Source,
    remodel: Remodel,
    key: jax.Array,
    *,
    optimizer_state: bool = False,
) -> TrainState:
    """The state of the new model, at the step of the source; deletes arrays of the source.

    What a model does may depend on its step, such as an annealed temperature. A run that starts
    from the model begins at step 0 unless `init_from.data_position` is set.

    Args:
      source: the old model.
      remodel: both models.
      key: random key for new parameters.
      optimizer_state: whether to carry moments.

    Raises:
      ValueError: the source has no optimizer state, or the mesh does not split the new model.
    """
    state, mesh = source.state, source.mesh
    require(
        not optimizer_state or bool(state.opt_state),
        "optimizer state can be carried only from a run that was trained",
        f"{source.workdir} has none",
        "Leave out --optimizer_state",
    )
    inference_rows(remodel.new, mesh)  # the mesh splits the new model
    opt_state: Any = ()
    if optimizer_state:
        opt_state = remodelled_optimizer(remodel, state.opt_state, state.params, key, mesh)
    source.state = state._replace(opt_state=(), params=None)
    params = remodelled(remodel, state.params, key, mesh, donate=True)
    model_state = remodelled_state(remodel, state.model_state, key)
    return TrainState(state.step, params, opt_state, model_state, state.key_data)


def describe_names(remodel: Remodel) -> str:
    """The trained names that the new model lacks, as a line to print; "" if there are none."""
    old, new = remodel.old.optimizer, remodel.new.optimizer
    left_out = [name for name in dict.fromkeys(old.chosen) if name not in new.chosen]
    if not left_out:
        return ""
    now = f"trainable={','.join(new.trainable)}, frozen={','.join(new.frozen) or '()'}"
    return (
        f"names of the optimizer that choose nothing in the new model are left out: "
        f"{', '.join(left_out)}; now {now}\n"
    )


def compare(source: Source, remodel: Remodel, state: TrainState) -> float:
    """The distance of the new model's logits from the old model's; see `difference`."""
    args = (state.params, state.model_state, source.batches, source.mesh, source.state.step)
    return difference(source.outputs, Outputs(remodel.new, *args))


def judge(source: Source, apart: float, *, allow_change: bool, fix: str) -> str:
    """A sentence about the comparison.

    Raises:
      ValueError: the logits change, and `allow_change` is False.
    """
    check_preserved(apart, allow_change, fix)
    verb = "preserved" if apart <= TOLERANCE else "changed"
    return (
        f"{verb}: logits of {source.outputs.num_tokens} held-out tokens differ by {apart:.3g} of "
        f"the largest one, where {TOLERANCE:g} counts as equal"
    )


def save(
    source: Source,
    remodel: Remodel,
    state: TrainState,
    output: pathlib.Path,
    origin: Mapping[str, Any],
) -> None:
    """Writes the directory of the new model; for the arguments see `make` and `save_made`."""
    origin = {"step": int(source.state.step), **origin}
    # A new name, since an export writes the family that an imported model is named after.
    name = f"{remodel.new.name}_{origin['made_by']}"
    config = dataclasses.replace(remodel.new, name=name)
    save_made(source.workdir, config, state, output, origin)


def save_made(
    workdir: pathlib.Path,
    config: ExperimentConfig,
    state: TrainState,
    output: pathlib.Path,
    origin: Mapping[str, Any],
) -> None:
    """Writes the directory of a model made from a run, completely or not at all.

    Its config starts from no other model: nothing that `init_from` said of the run holds for it.

    Args:
      workdir: of that run; a tokenizer in it is copied.
      config: of the new model.
      state: of the new model.
      output: the directory.
      origin: how it was made, as JSON values; `made_by` is the command.
    """
    record, _ = recorded_run(workdir)
    config = dataclasses.replace(config, mesh=MeshConfig(), init_from=InitFrom())
    kept = inherited(origin_of_run(workdir), origin["made_by"])
    with whole_or_absent(output) as partial:
        names = copy_tokenizer(workdir / TOKENIZER, partial / TOKENIZER)
        path = form_and_path(config.data.tokenizer)[1]
        given = pathlib.Path(path)
        if given.name in names and given.parent.name == TOKENIZER:
            moved = output.absolute() / TOKENIZER / given.name
            name = config.data.tokenizer.removesuffix(path) + str(moved)
            data = dataclasses.replace(config.data, tokenizer=name)
            config = dataclasses.replace(config, data=data)
        written = {"source": str(workdir), **origin, INHERITED: kept}
        save_state(partial, config, state, record.get("content", {}), written)
