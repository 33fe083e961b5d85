"""Imports and exports weights: `python -m moe_jax.convert --from-hf=DIR --workdir=OUT`.

--from-hf and --from-gguf create a run directory at step 0, which generate, evaluate and analyze
accept. --to-hf writes the newest checkpoint of any run as a directory that transformers loads.
--to-gguf writes it as a file that llama.cpp runs. --to-peft writes the adapters of a run as a
directory that PEFT loads. `docs/models.md` lists the families.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from moe_jax import command_line
from moe_jax.config.check import require

if TYPE_CHECKING:
    from moe_jax.config import ExperimentConfig
    from moe_jax.models.model import LanguageModel

MODES = ("from_hf", "from_gguf", "to_hf", "to_gguf", "to_peft")
# The modes that read each of these flags.
MODES_OF_FLAG = {
    "mesh": ("from_hf", "from_gguf", "to_hf", "to_gguf"),
    "compute_dtype": ("from_hf", "from_gguf"),
    "family": ("from_hf", "to_hf", "to_gguf", "to_peft"),
    "dtype": ("to_hf",),
    "format": ("to_gguf",),
    "base": ("to_peft",),
    "step": ("to_hf", "to_gguf", "to_peft"),
    "trust": ("to_hf", "to_gguf", "to_peft"),
}
LENGTH = "max_position_embeddings"  # the context length in a config.json


def main() -> None:
    """Runs the import or export that one of the five flags names."""
    values = flags.FLAGS
    given = [name for name in MODES if values[name].value is not None]
    if len(given) != 1:
        raise ValueError(
            "one of --from-hf, --from-gguf, --to-hf, --to-gguf and --to-peft must be given: "
            f"{[f'--{name}' for name in given] or 'none is'}. See --help."
        )
    named = [name for name in MODES_OF_FLAG if values[name].present]
    unused = [f"--{name}" for name in named if given[0] not in MODES_OF_FLAG[name]]
    require(
        not unused,
        f"--{given[0].replace('_', '-')} does not accept flags of another mode",
        ", ".join(unused),
        "Leave it out",
    )
    workdir = pathlib.Path(values.workdir)
    if given == ["to_hf"]:
        export(workdir, pathlib.Path(values.to_hf))
    elif given == ["to_gguf"]:
        export_gguf(workdir, pathlib.Path(values.to_gguf))
    elif given == ["to_peft"]:
        export_adapters(workdir, pathlib.Path(values.to_peft))
    else:
        bring_in(pathlib.Path(values[given[0]].value), workdir, given[0])
        print_losses(workdir)


def bring_in(source: pathlib.Path, workdir: pathlib.Path, mode: str) -> None:
    """Creates a run directory from a model, completely or not at all."""
    import jax

    from moe_jax.convert_tokenizer import bring_tokenizer
    from moe_jax.files import whole_or_absent
    from moe_jax.interchange.gguf_files import from_gguf
    from moe_jax.interchange.leaves import STATE
    from moe_jax.interchange.read import from_hf
    from moe_jax.parallel.mesh import make_mesh
    from moe_jax.training.imported import save_imported

    require(source.exists(), "a model is read from files that exist", f"there is no {source}",
            "Correct the path")  # fmt: skip
    given = command_line.mesh_of_flag()
    mesh = make_mesh(given.fill(jax.device_count())) if given else None
    with whole_or_absent(workdir) as partial:
        fields, content = bring_tokenizer(source, partial, mode)
        if mode == "from_hf":
            family = flags.FLAGS.family
            config, params = from_hf(source, dtype="float32", mesh=mesh, family=family)
        else:
            config, params = from_gguf(source, mesh=mesh)
        config = with_compute_dtype(config, flags.FLAGS.compute_dtype)
        if content:
            fields["tokenizer"] = str(workdir.absolute() / fields["tokenizer"])
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))
        state = params.pop(STATE, {})
        save_imported(partial, config, params, state, content, origin_of(source, config, mode))
    print(f"{config.name} of {source} is the run {workdir}")


def with_compute_dtype(config: "ExperimentConfig", dtype: str) -> "ExperimentConfig":
    """The config with this compute dtype."""
    model = dataclasses.replace(config.model, compute_dtype=dtype)
    return dataclasses.replace(config, model=model)


def print_losses(workdir: pathlib.Path) -> None:
    """Prints the router losses that training would add for an imported model, if any."""
    from moe_jax.training.files import CONFIG_FILE, read_json

    settings = [
        f"--config.model.parts.{name}.losses.{kind}.weight={loss['weight']:g}"
        for name, part in dict(read_json(workdir / CONFIG_FILE)["model"]["parts"]).items()
        for kind, loss in dict(part.get("losses", ())).items()
        if loss["weight"] > 0
    ]
    if settings:
        print(f"training adds these losses of routers; a weight of 0 is off: {' '.join(settings)}")


def origin_of(source: pathlib.Path, config: "ExperimentConfig", mode: str) -> dict[str, Any]:
    """What an export needs from the import: family, source, settings of the file, and dtypes."""
    from moe_jax.interchange.family import Reader, named_family
    from moe_jax.interchange.gguf_files import GGUFFile, hf_settings
    from moe_jax.interchange.read import read_settings
    from moe_jax.interchange.tensor_files import FLOATS, TensorFiles

    if mode != "from_hf":
        kept = {LENGTH: hf_settings(GGUFFile(source))[LENGTH]}
        return {"family": config.name, "source": str(source), "settings": kept}
    settings = read_settings(source)
    settings |= settings.get("text_config") or {}  # Llama 4 keeps its text model's there
    others = {name: value for name, value in settings.items() if name in Reader.HARMLESS}
    family = flags.FLAGS.family or config.name
    files = named_family(family).opened(TensorFiles(source))
    dtypes = {name: one.dtype.name for name, one in files.tensors.items()}
    dtypes = {name: dtype for name, dtype in dtypes.items() if dtype in FLOATS}
    return {"family": family, "source": str(source), "settings": others, "dtypes": dtypes}


class LoadedRun(NamedTuple):
    """A run loaded for export to another layout.

    Attributes:
      config: of the run; its model has no quantised weights and no adapters.
      params: its parameters, plus the state under "state" if there is any.
      step: of the checkpoint, the newest or --step.
      origin: what still holds of the import that the run descends from; see `origin_of_run`.
    """

    config: "ExperimentConfig"
    params: dict[str, Any]
    step: int
    origin: Mapping[str, Any]


def loaded(workdir: pathlib.Path) -> LoadedRun:
    """Loads the newest checkpoint of a run, or the one at --step."""
    from moe_jax.finetune.remodel import dense_model
    from moe_jax.interchange.leaves import STATE
    from moe_jax.models.wrapping import describe_dense
    from moe_jax.training.imported import origin_of_run
    from moe_jax.training.saved import load_run

    values = flags.FLAGS
    mesh = command_line.mesh_of_flag()
    config, state = load_run(workdir, mesh, values.step, trust=values.trust)
    check_annealed(config.model, int(state.step))
    print(describe_dense(config.model), end="")
    config, whole = dense_model(config, state.params)
    params = dict(whole)
    if state.model_state:
        params[STATE] = state.model_state
    return LoadedRun(config, params, int(state.step), origin_of_run(workdir))


def check_annealed(model: "LanguageModel", step: int) -> None:
    """Refuses a router whose temperature is that of a step of training: files have none.

    Raises:
      ValueError: names the part, the step and the end of the annealing.
    """
    from moe_jax.moe.routing.logits import LogitRouter

    for name, moe in model.moe_parts.items():
        if isinstance(moe.router, LogitRouter):
            settled = moe.router.projection.constant_from
            require(
                step >= settled,
                "a router can be written only after the annealing of its temperature",
                f"part {name!r} is annealed until step {settled}, this is step {step}",
                "Export a later step",
            )


def export(workdir: pathlib.Path, target: pathlib.Path) -> None:
    """Writes the newest checkpoint of a run, or the one at --step, in Hugging Face layout."""
    from moe_jax.convert_tokenizer import ends_of_documents, write_tokenizer
    from moe_jax.files import require_absent
    from moe_jax.interchange.family import named_family, trusted
    from moe_jax.interchange.write import to_hf

    values = flags.FLAGS
    require_absent(target)
    if values.family:
        named_family(values.family)
    run = loaded(workdir)
    to_hf(
        run.config,
        run.params,
        target,
        family=trusted(values.family, run.origin.get("family", "")),
        dtype=values.dtype or run.origin.get("dtypes"),
        settings={**ends_of_documents(run.config, run.origin), **run.origin.get("settings", {})},
    )
    write_tokenizer(run.config, workdir, target)
    print(f"step {run.step} of {workdir} is in {target}")


def export_gguf(workdir: pathlib.Path, target: pathlib.Path) -> None:
    """Writes the newest checkpoint of a run, or the one at --step, as a GGUF file."""
    from moe_jax.convert_tokenizer import words_of
    from moe_jax.interchange.gguf_write import check_target, to_gguf

    check_target(target)
    values, run = flags.FLAGS, loaded(workdir)
    words = words_of(workdir, run.config, run.step)
    recorded = run.origin.get("family", "")
    to_gguf(
        run.config,
        run.params,
        target,
        words,
        family=values.family or ("" if ":" in recorded else recorded),
        format=values.format,
        context_length=(run.origin.get("settings") or {}).get(LENGTH, 0),
    )
    print(f"step {run.step} of {workdir} is {target}, in {values.format}")


def export_adapters(workdir: pathlib.Path, target: pathlib.Path) -> None:
    """Writes the adapters of a run's newest checkpoint, or of --step, in PEFT layout."""
    from moe_jax.files import require_absent
    from moe_jax.interchange.family import trusted
    from moe_jax.interchange.peft import to_peft
    from moe_jax.training.imported import origin_of_run
    from moe_jax.training.saved import load_run

    require_absent(target)
    values = flags.FLAGS
    config, state = load_run(workdir, step=values.step, trust=values.trust)
    origin = origin_of_run(model_under(config, workdir))
    family, base = trusted(values.family, origin.get("family", "")), values.base
    if not base and "dtypes" in origin:  # imported from a Hugging Face directory
        base = origin.get("source", "")
    to_peft(config, state.params, target, family=family, base=base)
    print(f"the adapters of step {int(state.step)} of {workdir} are in {target}")
    if not base:
        print("the model under them is not named: load it and pass it to PEFT, or give --base")


def model_under(config: "ExperimentConfig", workdir: pathlib.Path) -> pathlib.Path:
    """The directory of the model that the adapters of a run were trained on."""
    from moe_jax.training.files import read_json
    from moe_jax.training.imported import IMPORTED_FILE
    from moe_jax.training.workdir import recorded_run

    path, imported = config.init_from.path, workdir / IMPORTED_FILE
    origin = read_json(imported) if imported.exists() else {}
    if not path and "made_by" in origin:  # quantised after its training
        trained = recorded_run(pathlib.Path(origin["source"]))[0]
        path = trained.get("init_from", {}).get("path", "")
    return pathlib.Path(path).expanduser() if path else workdir


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("from_hf", None, "Directory of config.json and safetensors files to read.")
    flags.DEFINE_string("from_gguf", None, "GGUF file of a dense Llama-like model to read.")
    flags.DEFINE_string("to_hf", None, "New directory to write the model of the workdir to.")
    flags.DEFINE_string("to_gguf", None, "New GGUF file to write the model of the workdir to.")
    flags.DEFINE_string("to_peft", None, "New directory to write the adapters of the workdir to.")
    flags.DEFINE_string(
        "base", "", "With --to-peft, name or directory of the model under the adapters, for PEFT; "
        "by default the source of the import that the run started from.",
    )  # fmt: skip
    flags.DEFINE_enum(
        "format", "F32", ["F32", "F16", "Q8_0", "Q4_0"], "With --to-gguf, of matrices."
    )
    flags.DEFINE_string(
        "workdir", None, "Directory of the run: a new one to make, or one to read with --to-hf, "
        "--to-gguf or --to-peft.",
    )  # fmt: skip
    flags.DEFINE_string(
        "family", "", "With --from-hf, the model_type to read as, by default that of config.json. "
        "With --to-hf, --to-gguf and --to-peft, the one to write; by default that of the import, "
        "or the first that can say the model. package.module:ATTRIBUTE names a table of yours.",
    )  # fmt: skip
    flags.DEFINE_enum(
        "dtype", "", ["", "float32", "bfloat16", "float16"],
        "With --to-hf, of the tensors; by default as imported, or float32.",
    )  # fmt: skip
    flags.DEFINE_enum(
        "compute_dtype", "float32", ["float32", "bfloat16"],
        "With --from-hf and --from-gguf, what the run computes in; its parameters are float32.",
    )  # fmt: skip
    command_line.define_mesh_flag()
    command_line.define_step_flag()
    command_line.define_trust_flag()


command = command_line.Command(main, define_flags, required=("workdir",))

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
