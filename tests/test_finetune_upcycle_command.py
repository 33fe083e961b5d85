"""The commands upcycle, merge_experts and prune_experts: runs in, runs out, refusals."""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import prune_experts, upcycle
from moe_jax.__main__ import main
from moe_jax.config import InitFrom, write_config
from moe_jax.finetune import made
from moe_jax.interchange.read import from_hf
from moe_jax.training.files import read_json
from moe_jax.training.imported import IMPORTED_FILE, save_state
from moe_jax.training.saved import load_run
from moe_jax.training.state import init_state
from tests.hf_families import CASES, write_model
from tests.tiny_run import CACHE, DENSE, tiny_config, tiny_state

HELD_OUT = {"heldout_fraction": 0.001, "cache_dir": str(CACHE / "moe_jax")}
CHANGED = r"logits must stay the same to 1e-05 of the largest one: they differ by ([\d.e-]+) of it"


def save_run(workdir, config):
    """Saves an untrained run at step seven, with moments of 1."""
    state = tiny_state(config)._replace(step=jnp.int32(7))
    abstract = jax.eval_shape(lambda: init_state(config))
    opt_state = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), abstract.opt_state)
    workdir.mkdir()
    save_state(workdir, config, state._replace(opt_state=opt_state), {}, {})
    return workdir


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A run of two dense layers."""
    config = tiny_config(DENSE)
    data = dataclasses.replace(config.data, **HELD_OUT)
    return save_run(
        tmp_path_factory.mktemp("dense") / "run", dataclasses.replace(config, data=data)
    )


def refused(capsys, *arguments):
    """The error that a refused command prints."""
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    assert ended.value.code == 1
    return capsys.readouterr().err


def test_a_run_becomes_a_sparse_run_with_its_moments_and_its_step(dense, tmp_path, capsys):
    arguments = ["upcycle", f"--workdir={dense}", "--experts=4", "--every=2"]
    assert main([*arguments, f"--output={tmp_path / 'new'}"]) == 0
    said = capsys.readouterr().out
    assert "moe: layers 1 have 4 experts of 32 hidden units, top 2" in said
    assert re.search(r"preserved: logits of 32 held-out tokens differ by [\d.e-]+ of", said)
    config, state = load_run(tmp_path / "new", moments=True)
    assert config.model.layers_of == {"attention": (0, 1), "mlp": (0,), "moe": (1,)}
    assert int(state.step) == 7 and state.opt_state == ()
    assert read_json(tmp_path / "new" / IMPORTED_FILE)["made_by"] == "upcycle"

    goes_on = ["--optimizer_state", f"--output={tmp_path / 'goes_on'}"]
    assert main([*arguments, *goes_on]) == 0
    _, state = load_run(tmp_path / "goes_on", moments=True)
    assert int(state.step) == 7 and int(state.opt_state[3].count) == 1
    moments = state.opt_state[1].mu["stack"]["unit"]["1"]["moe"]
    assert (moments["experts"]["wi"] == 1).all() and not moments["router"]["weight"].any()


def test_a_quantised_model_has_the_step_of_its_run(dense, tmp_path):
    """Annealed settings then have the values that they had in the run."""
    flags = ["--names=mlp", "--group_size=8", f"--output={tmp_path / 'small'}"]
    assert main(["quantise", f"--workdir={dense}", *flags]) == 0
    assert int(load_run(tmp_path / "small")[1].step) == 7


def test_gates_that_do_not_preserve_are_refused_and_nothing_is_written(dense, tmp_path, capsys):
    output = tmp_path / "deep" / "new"
    arguments = ["upcycle", f"--workdir={dense}", f"--output={output}", "--experts=4"]
    arguments += ["--block=router.renormalize=false"]
    said = refused(capsys, *arguments)
    assert float(re.search(CHANGED, said)[1]) > 1e-3 and "--allow_change" in said
    assert not list(tmp_path.iterdir())
    assert main([*arguments, "--allow_change"]) == 0
    assert "changed: logits" in capsys.readouterr().out
    assert load_run(output)[0].model.part["moe"].router.renormalize is False


def test_an_error_of_the_user_is_found_before_anything_is_read(
    dense, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(made, "load_run", lambda *_, **__: pytest.fail("the run was read"))
    arguments = ["upcycle", f"--workdir={dense}", f"--output={tmp_path / 'new'}"]
    for wrong, message in [
        ("--change=granulated", "a kind of upcycling is one of"),
        ("--change=drop:rate=0.5", "--change has the fields ['ratio']"),
        ("--change=drop:ratio=2", "ratio lies in (0, 1]"),
        ("--block=router.renormalise=true", "--block=router.renormalise"),
        ("--top_k=9", "num_selected_experts must lie in 1..num_experts"),
        ("--layers=1,x", "--layers must be a list of numbers: 1,x"),
        ("--layers=7", "the layers of the model are 0 to 1"),
        (f"--output={dense}", "is there already"),
    ]:
        assert message in refused(capsys, *arguments, wrong), wrong
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"adapters": {"rank": 2}}, r"it has adapters of attention\. Run merge_adapters first"),
        ({"quantisation": {"bits": 4, "group_size": 8}}, r"of 4 bits\. Use the run that was"),
    ],
)
def test_weights_of_several_arrays_are_refused_before_they_are_read(
    setting, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(made, "load_run", lambda *_, **__: pytest.fail("the run was read"))
    trainable = ("adapters",) if "adapters" in setting else ("all",)
    config = tiny_config({"model": setting, "optimizer": {"trainable": trainable}})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(write_config(config)))
    with pytest.raises(ValueError, match=message):
        made.open_source(tmp_path / "run", tmp_path / "new")
    with pytest.raises(ValueError, match=message):
        moe_jax.to_hf(config, {}, tmp_path / "hf")


def test_a_kill_leaves_nothing_that_looks_finished(dense, tmp_path, monkeypatch):
    """A killed process leaves only a folder of another name, which the next process replaces."""
    output, begun = tmp_path / "new", tmp_path / ".new.partial"
    save = made.save_state

    def look(workdir, *rest):
        assert workdir == begun and not output.exists()
        save(workdir, *rest)
        assert not output.exists()

    begun.mkdir()
    (begun / "config.json").write_text("{")
    monkeypatch.setattr(made, "save_state", look)
    assert main(["upcycle", f"--workdir={dense}", f"--output={output}", "--experts=2"]) == 0
    assert load_run(output)[0].model.part["moe"].num_experts == 2
    assert not begun.exists()


def test_a_made_model_does_not_start_as_the_run_did_that_it_was_made_from(dense, tmp_path):
    config, state = load_run(dense)
    given = InitFrom("elsewhere", 3, optimizer_state=True, fresh=("embedding",))
    origin = {"made_by": "quantise", "step": 7}
    config = dataclasses.replace(config, init_from=given)
    made.save_made(dense, config, state, tmp_path / "new", origin)
    assert load_run(tmp_path / "new")[0].init_from == InitFrom()


@pytest.mark.slow
def test_a_sparse_run_becomes_dense_again_and_loses_experts(dense, tmp_path, capsys):
    sparse, copy, fewer = (tmp_path / name for name in ("sparse", "copy", "fewer"))
    assert main(["upcycle", f"--workdir={dense}", f"--output={sparse}", "--experts=4"]) == 0
    assert main(["merge_experts", f"--workdir={sparse}", f"--output={copy}"]) == 0
    assert "mlp: layers 0, 1 are means of the experts of moe" in capsys.readouterr().out
    (before, old), (after, new) = load_run(dense), load_run(copy)
    assert before.model == after.model
    for one, other in zip(*map(jax.tree.leaves, (old.params, new.params)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)

    # All copies are used, but any of them can be dropped.
    arguments = ["prune_experts", f"--workdir={sparse}", f"--output={fewer}"]
    assert "an expert must be dropped" in refused(capsys, *arguments)
    assert main([*arguments, "--drop=1"]) == 0
    said = capsys.readouterr().out
    assert "moe: 3 of 4 experts are left; an expert axis of the mesh can have 1, 3 devices" in said
    assert "preserved" in said and "layer 1: drops 1, " in said
    assert load_run(fewer)[0].model.part["moe"].num_experts == 3


def test_it_is_said_why_no_expert_is_dropped(monkeypatch):
    values = SimpleNamespace(drop=[], keep=None)
    monkeypatch.setattr(prune_experts, "flags", SimpleNamespace(FLAGS=values))
    outputs = SimpleNamespace(load={"moe": np.ones((2, 4))}, num_tokens=32)
    with pytest.raises(ValueError, match=r"an expert must be dropped: .*\. Pass --drop or --keep"):
        prune_experts.experts_to_keep(SimpleNamespace(config=tiny_config(), outputs=outputs))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (4, r"--keep=4 keeps all of \{'moe': 4\}\. Lower --keep"),
        (1, r"'moe' keeps 1, a token selects 2\. Raise --keep"),
    ],
)
def test_a_number_to_keep_is_checked_by_the_config_alone(monkeypatch, keep, message):
    values = SimpleNamespace(drop=[], keep=keep)
    monkeypatch.setattr(prune_experts, "flags", SimpleNamespace(FLAGS=values))
    with pytest.raises(ValueError, match=message):
        prune_experts.check_kept(tiny_config())


def test_what_preserves_a_model_is_named_for_gates_that_do_not_sum_to_one():
    for flag in ("--router_stddev=0", "--change=shared", "--change=noise", "--change=drop"):
        assert flag in upcycle.FIX


@pytest.mark.slow
@pytest.mark.parametrize("command", ["merge_experts", "prune_experts"])
def test_fewer_experts_go_on_with_their_moments_and_the_step(dense, tmp_path, command):
    sparse, fewer = tmp_path / "sparse", tmp_path / "fewer"
    carried = "--optimizer_state"
    into = f"--output={sparse}"
    assert main(["upcycle", f"--workdir={dense}", into, "--experts=4", carried]) == 0
    drop = ["--drop=1"] if command == "prune_experts" else []
    assert main([command, f"--workdir={sparse}", f"--output={fewer}", *drop, carried]) == 0
    _, state = load_run(fewer, moments=True)
    assert int(state.step) == 7 and int(state.opt_state[1].count) == 1
    layer = state.opt_state[1].mu["stack"]["unit"]["0"]
    moments = layer["moe"]["experts"] if drop else layer["mlp"]
    assert moments["wi"].shape == ((2, 3, 16, 32) if drop else (2, 16, 32))
    np.testing.assert_allclose(moments["wi"], 1, rtol=1e-6)


@pytest.mark.slow
def test_a_mesh_makes_the_model_of_one_device(dense, tmp_path):
    states = []
    for name, flags in (("one", []), ("mesh", ["--mesh=fsdp=2,expert=2,tensor=2"])):
        output = tmp_path / name
        arguments = [f"--workdir={dense}", f"--output={output}", "--experts=4", "--change=noise"]
        assert main(["upcycle", *arguments, "--allow_change", *flags]) == 0
        states.append(load_run(output)[1])
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def imported(folder, name, **settings):
    """A tiny model of another library, imported as a run, with all bytes in its vocabulary."""
    case = CASES[name]
    case = dataclasses.replace(case, settings={**case.settings, "vocab_size": 384, **settings})
    model, run = write_model(folder / "hf", case), folder / "run"
    assert main(["convert", f"--from-hf={model}", f"--workdir={run}"]) == 0
    return run


@pytest.mark.slow
def test_an_imported_llama_becomes_a_mixtral(tmp_path):
    run, new = imported(tmp_path, "llama"), tmp_path / "new"
    arguments = [f"--workdir={run}", f"--output={new}", "--experts=4"]
    arguments += ["--block=losses.router_z.weight=0"]
    assert main(["upcycle", *arguments]) == 0
    assert main(["convert", f"--workdir={new}", f"--to-hf={tmp_path / 'mixtral'}"]) == 0
    assert read_json(tmp_path / "mixtral" / "config.json")["model_type"] == "mixtral"
    config, params = from_hf(tmp_path / "mixtral")
    assert config.model.part["moe"].num_experts == 4
    for one, other in zip(*map(jax.tree.leaves, (params, load_run(new)[1].params)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_an_imported_t5_becomes_a_switch_and_a_t5_again(tmp_path, capsys):
    """The gate of top-1 routing is the probability: exactly 1 / E only at router_stddev=0."""
    run, new, back = imported(tmp_path, "t5"), tmp_path / "new", tmp_path / "back"
    arguments = ["upcycle", f"--workdir={run}", f"--output={new}", "--experts=4", "--top_k=1"]
    arguments += ["--every=2"]
    assert float(re.search(CHANGED, refused(capsys, *arguments))[1]) > 1e-5
    assert main([*arguments, "--router_stddev=0"]) == 0
    model = load_run(new)[0].model
    assert model.layers_of["encoder_moe"] and model.layers_of["moe"]
    assert main(["merge_experts", f"--workdir={new}", f"--output={back}"]) == 0
    (before, old), (after, merged) = load_run(run), load_run(back)
    assert before.model == after.model
    for one, other in zip(*map(jax.tree.leaves, (old.params, merged.params)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
