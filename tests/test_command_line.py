"""How commands answer their flags, in this process, before any computation."""

import dataclasses
import errno
import importlib
import logging
import os
import re
import shlex
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict

from moe_jax import __main__ as entry
from moe_jax import __version__, command_line, interrupts
from moe_jax.config import (
    DataConfig,
    ExperimentConfig,
    InitFrom,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
    config_dict,
    from_config_dict,
    installed,
    write_config,
)
from moe_jax.config.describe import comments_of, describe_settings
from moe_jax.config.file import (
    config_with,
    load_config,
    override,
    parse_value,
    settings_of,
    split_overrides,
)
from moe_jax.config.json_text import json_text
from moe_jax.config.kinds import KINDS, load_kind
from moe_jax.config.settings import Settings
from moe_jax.moe.part import MoE
from moe_jax.user_errors import describe, is_transient, whole_flags
from tests.tiny_run import ROOT, tiny_config

SMOKE = f"--config={ROOT}/configs/quickstart.py:smoke"
WITH_FLAGS = [name for name, (path, _) in entry.COMMANDS.items() if path.endswith(":command")]


def command_of(name):
    module, _, function = entry.COMMANDS[name][0].partition(":")
    return getattr(importlib.import_module(module), function)


def refused(capsys, name, *arguments):
    """Returns the message of a refused command: one line, with exit code 1."""
    with pytest.raises(SystemExit) as ended:
        command_of(name)(arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 1 and not printed.out
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    return printed.err


def flags_of(name, kind):
    """Flags of a command that accept values of this type."""
    before = set(flags.FLAGS)
    command = command_of(name)
    command.define_flags()
    own = [flag for flag in flags.FLAGS if flag not in before]
    try:
        return [f for f in own if flags.FLAGS[f].flag_type() in (kind, f"multi {kind}")]
    finally:
        for flag in own:
            delattr(flags.FLAGS, flag)


@pytest.mark.parametrize(
    ("arguments", "patterns"),
    [
        ([SMOKE], ["--workdir must be given: Directory of the run"]),
        ([SMOKE, "--workdir="], ["--workdir is empty: --workdir=. Give it a value"]),
        ([], ["--config, --workdir must be given"]),
        ([SMOKE, "--workdir=w", "--wokdir=x"], ["no flag --wokdir. Did you mean --workdir"]),
        ([SMOKE, "--workdir=w", "--hlp"], ["no flag --hlp. Did you mean --help"]),
        ([SMOKE, "--workdir=w", "more"], [r"--NAME=VALUE: unexpected arguments: \['more'\]"]),
        ([SMOKE, "--workdir=w", "--startup_seconds=x"], ["--startup_seconds=x", "Correct it"]),
        (["--workdir=w", "--config.seed=1"], ["--config, .*must be given|--config must be given"]),
        ([SMOKE.replace("smoke", "smok"), "--workdir=w"], [r"quickstart\.py, line", r"\['smok'\]"]),
    ],
)
def test_a_wrong_flag_is_named_with_the_fix(capsys, arguments, patterns):
    message = refused(capsys, "train", *arguments)
    for pattern in patterns:
        assert re.search(pattern, message), message


@pytest.mark.parametrize(
    ("flag", "patterns"),
    [
        ("modle.model_dim=16", ["--config.modle.model_dim", "mean --config.model.model_dim"]),
        ("model.part.moe.num_experts=4", ["mean --config.model.parts.moe.num_experts"]),
        ("model.parts.mo.num_experts=4", ["mean --config.model.parts.moe.num_experts"]),
        ("model.parts.moe.num_expert=4", ["mean --config.model.parts.moe.num_experts"]),
        ("training.num_step=4", ["mean --config.training.num_steps"]),
        ("num_steps=4", ["mean --config.training.num_steps"]),
        ("zzz=4", ["'zzz' is not a field of config, .*'training'", "--help lists every setting"]),
        ("training.num_steps=abc", ["--config.training.num_steps is of type int: 'abc'"]),
        ("training.num_steps=1.5", ["--config.training.num_steps is of type int: '1.5'"]),
        ("training.num_steps", ["--config.training.num_steps is of type int: it has no value"]),
        ("training.num_steps=None", ["config.training.num_steps is of type int: None"]),
        ("training.num_steps.x=3", ["--config.training.num_steps is one value, 20"]),
        ("optimizer.learning_rate=fast", ["is of type float: 'fast'", "3e-4"]),
        ("model.scan_layers=perhaps", ["is of type bool: 'perhaps'", "true or false"]),
        ("data.domain_weights=(('a',", ["--config.data.domain_weights is of type tuple"]),
        ("model=3", ["flags set fields", "--config.model=3 would replace a section"]),
        ("model.parts.moe.router=soft", ["flags set fields", "router=soft"]),
        ("model.parts.moe.kind=mlp", ["flags set fields", "--config.model.parts.moe.kind"]),
        ("model.parts.moe.bias.rate=0.1", ["flags set fields", "bias=None has no fields"]),
        ("data.corpus=jsonl:gs://b/c", ["--config.data.corpus=jsonl:gs://b/c is a URL", "Mount"]),
    ],
)
def test_a_wrong_setting_is_named_as_a_whole_flag(capsys, flag, patterns):
    message = refused(capsys, "train", SMOKE, "--workdir=w", f"--config.{flag}")
    for pattern in patterns:
        assert re.search(pattern, message), message


def test_settings_are_overridden_by_their_types():
    config = load_config(f"{ROOT}/configs/quickstart.py:smoke")
    for flag, text, expected in [
        ("training.num_steps", "7", 7),
        ("optimizer.learning_rate", "1", 1.0),
        ("model.scan_layers", "TRUE", True),
        ("model.tie_embeddings", False, False),
        ("data.domain_weights", "(('prose', 1.0),)", (("prose", 1.0),)),
        ("training.sample_prompt", "2", "2"),
        ("model.parts.moe.bias", "sign", "sign"),
        ("model.embedding_multiplier", "2.5", 2.5),
        ("model.adapters.names", "attention,experts", ("attention", "experts")),
        ("model.quantisation.bits", "4", 4),
        ("optimizer.trainable", "adapters", ("adapters",)),
    ]:
        override(config, f"config.{flag}", text)
        found = settings_of(config)[f"config.{flag}"]
        assert found == expected and type(found) is type(expected), flag
    from_config_dict(config)


def test_none_takes_a_number_away():
    config = load_config(f"{ROOT}/configs/grok1.py:tiny")
    assert from_config_dict(config).model.part["attention"].softcap == 30.0
    override(config, "config.model.parts.attention.softcap", "None")
    assert from_config_dict(config).model.part["attention"].softcap is None


def test_flags_of_the_config_may_stand_apart_from_their_values():
    written = ["--config=a", "--config.seed", "-3", "--noconfig.x", "--config.y", "--z=1"]
    plain, overrides = split_overrides(written)
    assert plain == ["--config=a", "--z=1"]
    assert overrides == [("config.seed", "-3"), ("config.x", False), ("config.y", True)]


def test_no_before_a_setting_has_no_value():
    with pytest.raises(ValueError, match=r"--noconfig\.x=true\. Write --config\.x=false\."):
        split_overrides(["--noconfig.x=true"])


def test_a_setting_that_the_config_file_leaves_out_is_said_to_be_added_there():
    config = ConfigDict({"training": {"num_steps": 5}}).lock()
    for flag, line in [
        ("seed", r"config\.seed = 0"),
        ("training.batch_size", r"config\.training\.batch_size = \d+"),
        ("optimizer.learning_rate", r"config\.optimizer = {'learning_rate': [\d.]+}"),
    ]:
        with pytest.raises(ValueError, match=rf"--config\.{flag}\. Add {line} to it\."):
            override(config, f"config.{flag}", "1")
    with pytest.raises(ValueError, match=r"Did you mean --config\.training\.num_steps"):
        override(config, "config.training.num_step", "1")


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("model.parts.moe.router.topk", "model.parts.moe.num_selected_experts"),
        ("model.parts.moe.num_experts_per_tok", "model.parts.moe.num_selected_experts"),
        ("model.parts.moe.capacity_factor", "model.parts.moe.capacity.train_factor"),
        ("optimizer.lr", "optimizer.learning_rate"),
    ],
)
def test_a_name_of_another_system_is_answered_with_the_name_here(name, setting):
    config = config_dict(tiny_config())
    with pytest.raises(ValueError, match=rf"Did you mean --config\.{re.escape(setting)}\?"):
        override(config, f"config.{name}", "2")


FILES = {
    "raises.py": ("x = 1\ndef get_config():\n    return 1 / 0\n", "line 3: ZeroDivisionError"),
    "exits.py": ("def get_config():\n    raise KeyError('a')\n", "line 2: KeyError: 'a'"),
    "syntax.py": ("\ndef get_config(\n", r"syntax\.py, line 2: SyntaxError"),
    "none.py": ("def get_config():\n    pass\n", "it returned NoneType"),
    "nothing.py": ("x = 1\n", r"must define get_config\(\): it does not"),
    "imports.py": ("import not_there\n", "line 1: ModuleNotFoundError.*Install it"),
    "lfs.py": ("version https://git-lfs.github.com/spec/v1\noid x\n", "git lfs pull"),
    "zero.py": ("\0", r"zero\.py.*null bytes"),
    "config.yaml": ("{}", r"Python file, \*\.py"),
    "refused.py": (
        "from moe_jax.config import TrainingConfig\n"
        "def get_config():\n    return TrainingConfig(num_steps=0)\n",
        r"refused\.py, line 3: num_steps lies in \[1, inf\): num_steps=0",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_config_file_that_fails_is_named_with_its_line(capsys, tmp_path, name):
    content, pattern = FILES[name]
    (tmp_path / name).write_text(content)
    message = refused(capsys, "train", f"--config={tmp_path / name}", "--workdir=w")
    assert re.search(pattern, message) and str(tmp_path / name) in message, message


def test_presets_of_a_file_without_any_are_refused(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text("import configs.base\nget_config = lambda: configs.base.get_config()\n")
    assert load_config(str(path)).training.num_steps == 1000
    with pytest.raises(ValueError, match="takes no presets: 'smoke'"):
        load_config(f"{path}:smoke")


def test_the_recorded_config_of_a_run_is_a_config_that_flags_change(tmp_path):
    """For example, an imported or upcycled model, whose settings are in no Python file."""
    given = load_config("configs/deepseek_v3.py:tiny")
    path = tmp_path / "config.json"
    path.write_text(json_text(write_config(from_config_dict(given))))
    found = load_config(str(path))
    override(found, "config.model.parts.moe.num_experts", "16")
    override(given, "config.model.parts.moe.num_experts", "16")
    assert from_config_dict(found) == from_config_dict(given)
    with pytest.raises(ValueError, match="takes no presets: 'tiny'"):
        load_config(f"{path}:tiny")


def test_another_source_takes_nothing_of_what_a_recorded_config_said_of_the_old_one(tmp_path):
    """Else `fresh` would draw anew what that run has trained."""
    recorded = InitFrom("old", 2, optimizer_state=True, data_position=True, fresh=("adapters",))
    path = tmp_path / "config.json"
    path.write_text(json_text(write_config(ExperimentConfig(init_from=recorded))))

    def init_from(*flags):
        overrides = [(f"config.init_from.{name}", text) for name, text in flags]
        return from_config_dict(config_with(str(path), overrides)).init_from

    assert init_from() == recorded
    assert init_from(("step", "3")) == dataclasses.replace(recorded, step=3)
    assert init_from(("path", "new")) == InitFrom("new")
    given = init_from(("fresh", "router"), ("path", "new"), ("step", "4"))
    assert given == InitFrom("new", 4, fresh=("router",))


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "JSONDecodeError"),
        ("[]", "must be the config.json of a run: it has list"),
        ('{"loss": 1}', r"must be the config.json of a run: it has \['loss'\]"),
        ('{"model": {}, "sources": {"a.b:C": "0"}}', "it names a.b:C. Name the Python file"),
        ('{"model": {}}', "only configs in the layouts of formats"),
    ],
)
def test_other_json_is_refused_with_its_path(tmp_path, text, message):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_config(str(path))
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_config_files_are_found_from_any_folder(tmp_path, monkeypatch):
    """So is `configs.base`, which they import. A file in the current folder takes precedence."""
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/quickstart.py:smoke").name == "quickstart_smoke"
    (tmp_path / "configs").mkdir()
    own = tmp_path / "configs" / "quickstart.py"
    own.write_text(
        "from configs.base import default_config\n"
        "def get_config():\n    c = default_config()\n    c.name = 'own'\n    return c\n"
    )
    assert load_config("configs/quickstart.py").name == "own"
    with pytest.raises(ValueError, match=rf"none at {tmp_path}/configs/none\.py and {ROOT}/") as e:
        load_config("configs/none.py")
    assert "configs/quickstart.py" in str(e.value)
    with pytest.raises(ValueError, match="is a folder"):
        load_config("configs")


def test_messages_tell_how_to_install_an_extra_where_the_library_stands(monkeypatch, tmp_path):
    assert installed.install_command("tpu") == f"pip install -e '{ROOT}[tpu]'"
    monkeypatch.setattr(installed, "PACKAGE", tmp_path / "moe_jax")
    assert installed.install_command("tpu") == "pip install 'moe_jax[tpu]'"
    assert installed.home() == tmp_path / "moe_jax" / "shipped"


@pytest.mark.parametrize("name", WITH_FLAGS)
def test_every_path_of_every_command_refuses_a_bucket(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    needed = [f"--{flag}=x" for flag in command_of(name).required if flag != "config"]
    config = [SMOKE] if "config" in command_of(name).required else []
    operands = ["x"] if command_of(name).positional else []
    for flag in flags_of(name, "string"):
        if flag not in command_line.TEXT_FLAGS:
            arguments = (*config, *needed, f"--{flag}=gs://bucket/run", *operands)
            message = refused(capsys, name, *arguments)
            assert f"--{flag}=gs://bucket/run is a URL. Mount the bucket" in message
    assert not list(tmp_path.iterdir()), "no folder gs: is made"


@pytest.mark.parametrize("name", WITH_FLAGS)
def test_every_number_of_every_command_is_finite(capsys, name):
    needed = [f"--{flag}=x" for flag in command_of(name).required if flag != "config"]
    config = [SMOKE] if "config" in command_of(name).required else []
    for flag in flags_of(name, "float"):
        for value in ("nan", "inf"):
            message = refused(capsys, name, *config, *needed, f"--{flag}={value}")
            assert f"--{flag}" in message and value in message


@pytest.mark.parametrize("name", WITH_FLAGS)
def test_help_lists_the_flags_of_a_command(capsys, name):
    assert command_of(name)(["--help"]) == 0
    said = capsys.readouterr().out
    for kind in ("string", "int", "float", "bool"):
        for flag in flags_of(name, kind):
            assert re.search(rf"^  --(\[no\])?{flag}\b", said, re.MULTILINE), flag
    assert "--alsologtostderr" not in said


def test_help_lists_every_setting_with_its_comment(capsys):
    assert command_of("train")(["--config", SMOKE.removeprefix("--config="), "--help"]) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if re.match(r" +['\"]?--config\.", line)]
    words = [shlex.split(line, comments=True) for line in lines]  # parsed as a shell does
    assert "--config.training.trackers=('tensorboard',)" in (word for (word,) in words)
    pasted, _ = split_overrides([word for (word,) in words])
    assert not pasted
    for flag in settings_of(load_config(SMOKE.removeprefix("--config="))):
        part = flag.endswith(".kind") or len(re.findall(rf"  \"?--{re.escape(flag)}=", said)) == 1
        assert part or flag.split(".")[-1] in ("losses", "noise"), flag
    assert re.search(r"--config.training.batch_size=8 +# sequences a step, over all devices", said)
    assert re.search(r"--config.data.objective=causal_lm +# \"causal_lm\", \"prefix_lm\"", said)
    # A part within a part: its comment comes from the source of its class.
    assert re.search(r"--config.model.parts.moe.capacity.minimum=1 +# fewest slots", said)


def test_a_flag_that_is_missing_or_empty_is_one_sentence(capsys):
    message = refused(capsys, "sweep", SMOKE, "--out=o")
    assert message == (
        "error: --set must be given: NAME=VALUE,VALUE of a setting to vary; may be given again. "
        "See --help.\n"
    )
    assert "--prompt is empty: --prompt=. Give" in refused(
        capsys, "generate", "--workdir=w", "--prompt="
    )


def test_help_that_nobody_reads_to_its_end_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys, moe_jax.train as t; sys.exit(t.command(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 0 and not done.stderr


def test_comments_are_those_of_the_source():
    assert comments_of(MoE)["use_bias"] == "biases in the experts"
    assert comments_of(MoE)["num_experts"] == "E: routed experts"
    assert comments_of(DataConfig)["cache_dir"].startswith("Of token files")  # the line above it
    paths = [setting.path for setting in describe_settings(ExperimentConfig())]
    assert len(paths) == len(set(paths))


def test_several_cpu_devices_take_collectives_in_one_order():
    option = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    for given, expected in [
        ({}, {}),
        ({"JAX_NUM_CPU_DEVICES": "1"}, {"JAX_NUM_CPU_DEVICES": "1"}),
        ({"JAX_NUM_CPU_DEVICES": "4"}, {"JAX_NUM_CPU_DEVICES": "4", "XLA_FLAGS": option}),
        (
            {"JAX_NUM_CPU_DEVICES": "4", "XLA_FLAGS": "--xla_a=1"},
            {"JAX_NUM_CPU_DEVICES": "4", "XLA_FLAGS": f"--xla_a=1 {option}"},
        ),
    ]:
        command_line.order_collectives(given)
        assert given == expected
        command_line.order_collectives(given)
        assert given == expected
    of_several_processes = {"JAX_NUM_CPU_DEVICES": "1"}
    command_line.order_collectives(of_several_processes, processes=True)
    assert of_several_processes["XLA_FLAGS"] == option


def test_every_setting_has_a_comment():
    sections = [ExperimentConfig, DataConfig, OptimizerConfig, TrainingConfig, MeshConfig]
    kinds = [load_kind(family, kind) for family, kinds in KINDS.items() for kind in kinds]
    none = [
        f"{cls.__name__}.{name}"
        for cls in [*sections, *kinds]
        for name, comment in comments_of(cls).items()
        if not comment and not isinstance(getattr(cls, name, None), Settings)
    ]
    assert not none


def test_messages_name_settings_as_whole_flags():
    settings = ["config.training.batch_size", "config.model.parts.moe.num_experts",
                "config.name", "config.optimizer.name", "config.mesh.data"]  # fmt: skip
    for said, expected in [
        ("batch_size=7 is odd.", "--config.training.batch_size=7 is odd."),
        ("Lower training.batch_size.", "Lower --config.training.batch_size."),
        ("config.training.batch_size is", "--config.training.batch_size is"),
        ("config.model.parts.moe: num_experts=4", "config.model.parts.moe: "
         "--config.model.parts.moe.num_experts=4"),
        ("of=Own(batch_size=7, to=Of(num_experts=3)), num_experts=4",
         "of=Own(batch_size=7, to=Of(num_experts=3)), --config.model.parts.moe.num_experts=4"),
        ("the batch_size of", "the batch_size of"),
        ("name=x could be two", "name=x could be two"),
        ("in runs/training.batch_size and --mesh=data=16", "in runs/training.batch_size and "
         "--mesh=data=16"),
        ("in /r/b=1,batch_size=8/c, batch_size=8", "in /r/b=1,batch_size=8/c, "
         "--config.training.batch_size=8"),
        ("Set --config.x=/r/b=1,batch_size=8", "Set --config.x=/r/b=1,batch_size=8"),
        ("b=1,batch_size=8: config.model.parts.moe: num_experts=4", "b=1,batch_size=8: "
         "config.model.parts.moe: --config.model.parts.moe.num_experts=4"),
    ]:  # fmt: skip
        assert whole_flags(said, settings) == expected


def test_errors_are_one_line_and_those_of_the_system_have_a_fix(tmp_path):
    assert describe(ValueError("two differ:\n  a: 1 -> 2\n  b: 3\nChange them.")) == (
        "two differ: a: 1 -> 2; b: 3. Change them."
    )
    with pytest.raises(OSError) as raised:
        (tmp_path / "none").read_text()
    said = describe(raised.value)
    assert said == f"No such file or directory: {tmp_path / 'none'}. Correct the path."
    assert "permissions" in describe(PermissionError(errno.EACCES, "Permission denied", "/x"))
    assert describe(ValueError("Two:\nMesh=1\nData.size=2")) == "Two: Mesh=1; Data.size=2"
    assert "space" in describe(OSError(errno.ENOSPC, "No space left on device", "/x"))


def test_an_error_that_may_pass_is_told_from_one_that_stays():
    stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/x")
    assert is_transient(stale)
    assert is_transient(OSError(f"The checkpoint of step 3 cannot be written: {stale.strerror}"))
    assert not is_transient(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x"))
    assert not is_transient(ValueError(stale.strerror))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_DEFAULT_PRNG_IMPL", "rbg"),
        ("JAX_DEFAULT_PRNG_IMPL", "none"),
        ("JAX_ENABLE_X64", "1"),
        ("JAX_THREEFRY_PARTITIONABLE", "false"),
    ],
)
def test_the_environment_cannot_change_what_a_config_means(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value}.*Unset {name}"):
        command_line.check_environment({name: value})
    command_line.check_environment({"JAX_DEFAULT_PRNG_IMPL": "threefry2x32", "JAX_ENABLE_X64": ""})


def test_warnings_of_a_command_are_printed_as_its_errors_are(monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [])
    command = command_line.Command(
        lambda: logging.getLogger("moe_jax.x").warning("%d rows are kept.", 3),
        lambda: None, uses_devices=False,
    )  # fmt: skip
    assert command([]) == command([]) == 0
    assert capsys.readouterr().err == "warning: 3 rows are kept.\n" * 2


def test_a_study_has_help_where_it_cannot_run(monkeypatch, capsys):
    monkeypatch.setattr(entry.importlib.util, "find_spec", lambda name: None)
    assert entry.main(["study", "--help"]) == 0
    assert "Clone the repository" in capsys.readouterr().out
    assert entry.main(["study"]) == 1
    assert "error: studies run in a checkout" in capsys.readouterr().err


def test_a_command_may_take_arguments_without_flags(capsys):
    given = []
    command = command_line.Command(given.extend, lambda: None, positional="RUN", uses_devices=False)
    assert command(["a", "b"]) == 0 and given == ["a", "b"]
    with pytest.raises(SystemExit):
        command([])
    assert "error: RUN must be given, one or more" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    command_line.require_folder("out", str(tmp_path / "new" / "folder"))
    with pytest.raises(ValueError, match=rf"--out is a folder: {tmp_path}/file is a file"):
        command_line.require_folder("out", str(tmp_path / "file" / "folder"))
    command_line.require_file("csv", str(tmp_path / "new" / "x.csv"))
    command_line.require_file("csv", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=rf"--csv is a file: --csv={tmp_path} is a folder"):
        command_line.require_file("csv", str(tmp_path))
    with pytest.raises(ValueError, match=rf"--csv is .*in a folder: {tmp_path}/file is a file"):
        command_line.require_file("csv", str(tmp_path / "file" / "x.csv"))


@pytest.mark.parametrize(
    ("name", "arguments", "pattern"),
    [
        ("compare", ["{folder}", "--out={file}"], "--out is a folder: .*/file is a file"),
        ("compare", ["{folder}", "--csv={folder}"], "--csv is a file: "),
        ("sweep", [SMOKE, "--set=seed=0", "--out={file}"], "--out is a folder: "),
        ("analyze", ["--workdir={file}"], "--workdir is a folder: "),
        ("analyze", ["--workdir={folder}", "--out={file}"], "--out is a folder: "),
    ],
)
def test_where_results_go_is_checked_before_the_work(tmp_path, capsys, name, arguments, pattern):
    (tmp_path / "file").touch()
    places = {"folder": tmp_path, "file": tmp_path / "file"}
    given = [argument.format(**places) for argument in arguments]
    assert re.search(pattern, refused(capsys, name, *given))


def test_one_entry_has_all_commands(capsys):
    for name in entry.COMMANDS:
        assert callable(command_of(name))
    assert entry.main(["--version"]) == 0 and capsys.readouterr().out == f"moe_jax {__version__}\n"
    assert entry.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", said, re.MULTILINE) for name in entry.COMMANDS)
    assert entry.main(["trian"]) == 1
    assert "Did you mean 'train'" in capsys.readouterr().err
    assert entry.main([]) == 2


def test_the_last_good_step_is_a_sentence_of_its_own_behind_one(monkeypatch, capsys):
    monkeypatch.setattr(interrupts, "_before_end", lambda: "last good step: 7")
    for error, said in (
        (OSError("It is gone. Bring it back."), "It is gone. Bring it back. Last good step: 7.\n"),
        (OSError("It is gone"), "It is gone; last good step: 7\n"),
    ):
        with pytest.raises(SystemExit):
            command_line.fail(error)
        assert capsys.readouterr().err == f"error: {said}"


def test_a_path_may_begin_with_the_home_of_the_user(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = []

    def define():
        for name in ("workdir", "prompt"):
            flags.DEFINE_string(name, "", "A flag.")

    command = command_line.Command(
        lambda: found.extend([flags.FLAGS.workdir, flags.FLAGS.prompt]), define, uses_devices=False
    )
    assert command(["--workdir=~/x", "--prompt=~/x"]) == 0
    assert found == ["/home/me/x", "~/x"]


def test_what_has_no_value_is_refused_as_any_other():
    with pytest.raises(ValueError, match="is of type tuple"):
        parse_value("--config.data.domain_weights", "{[1]: 2}", tuple)
