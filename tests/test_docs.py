"""The code in docs/ runs and matches the text, and links between pages resolve."""

import dataclasses
import importlib
import json
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml

import moe_jax
from docs import make_models
from docs.make_api import PAGE, make_page
from moe_jax import Call, Dims, MoE, ParameterSpec, init_parameters, moe_block
from moe_jax.checks import CHECKS, Trial, check
from moe_jax.config import from_config_dict
from moe_jax.interchange.family import trusted
from moe_jax.parameters import ones
from moe_jax.training.loss import Scored, Totals, target_nats

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("experiments/**/*.md")])


def code_of(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_block_in_plain_numpy_is_the_block():
    [code] = code_of("block.md")
    assert len(code.splitlines()) <= 65
    names = {}
    exec(code, names)
    moe = MoE(num_experts=4, num_selected_experts=2, expert_dim=8, run_experts="einsum")
    params = init_parameters(jax.random.key(0), moe.specs(Dims(16)))
    params["router"]["weight"] *= 20  # confident, so that some experts are full
    x, dy = np.random.default_rng(1).normal(size=(2, 3, 12, 16)).astype(np.float32)

    def plain(params, x):
        y, aux = names["block"](params, x, moe.num_selected_experts, moe.capacity.train_factor)
        return jnp.sum(y * dy) + 0.01 * aux["load_balance_loss"], (y, aux)

    def library(params, x):
        y, aux = moe_block(params, x, moe, Call(rng=jax.random.key(2)))
        of_layers = aux._replace(
            sums=jax.tree.map(lambda a: a[None], aux.sums), sequences={"losses": empty(aux)}
        )
        loss = moe.loss(of_layers, jnp.float32(36), of_layers.sums)
        sums = {name: aux.sums[name] for name in ("assigned_KE", "kept_KE", "prob_sum_E")}
        metric = moe.metrics(of_layers._replace(maxima=add_layer(aux.maxima)))
        sums["load_balance_loss"] = metric["load_balance_loss"][0]
        return jnp.sum(y * dy) + loss, (y, sums)

    outputs = [
        jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))(params, x)
        for function in (plain, library)
    ]
    kept, assigned = (outputs[0][0][1][1][name].sum() for name in ("kept_KE", "assigned_KE"))
    assert kept < assigned
    assert jax.tree.structure(outputs[0]) == jax.tree.structure(outputs[1])
    for given, expected in zip(*map(jax.tree.leaves, outputs), strict=True):
        scale = np.abs(expected).max()
        assert scale > 0
        np.testing.assert_allclose(given, expected, rtol=0, atol=1e-6 * scale)


def add_layer(tree):
    return jax.tree.map(lambda a: a[None], tree)


def empty(aux):
    return {name: add_layer(value) for name, value in aux.sequences["losses"].items()}


@pytest.fixture(scope="module")
def my_parts(tmp_path_factory):
    """The classes of the page as the module that it names."""
    *classes, _ = code_of("extending.md")
    directory = tmp_path_factory.mktemp("extending")
    (directory / "my_parts.py").write_text("\n\n".join(classes), encoding="utf-8")
    sys.path.insert(0, str(directory))
    yield importlib.import_module("my_parts")
    sys.path.remove(str(directory))
    del sys.modules["my_parts"]


def test_a_config_names_the_parts_of_the_page(my_parts):
    names = {}
    exec(code_of("extending.md")[-1], names)
    parts = names["config"].model.part
    assert parts["mixer"] == my_parts.MovingAverage(window=8)
    assert parts["moe"].router == my_parts.RoundRobin(offset=1)
    assert parts["moe"].losses == (my_parts.Peakedness(weight=0.01),)
    assert names["config"].training.loss == my_parts.Smoothed(amount=0.1)
    queued = dataclasses.replace(
        parts["moe"],
        capacity=dataclasses.replace(parts["moe"].capacity, queue=my_parts.LastFirst()),
    )
    parts = {**parts, "moe": queued}
    with pytest.raises(ValueError, match="must not depend on later tokens"):
        dataclasses.replace(names["config"].model, parts=parts)


def test_the_training_loss_of_the_page_is_that_of_smoothed_labels(my_parts):
    """The loss equals optax's over two sequences that are two parts of a batch."""
    rng = np.random.default_rng(0)
    logits_BLV, targets_BL = rng.normal(size=(2, 3, 5)), rng.integers(0, 5, (2, 3))
    weights_BL = np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 0.5]])
    labels_BLV = optax.smooth_labels(jax.nn.one_hot(targets_BL, 5), 0.3)
    expected = np.sum(optax.softmax_cross_entropy(logits_BLV, labels_BLV) * weights_BL) / 4.5
    loss = 0.0
    for one in range(2):
        batch = {"loss_weights": weights_BL[one : one + 1]}
        nats_BL = target_nats(logits_BLV[one : one + 1], targets_BL[one : one + 1])
        share = jnp.sum(nats_BL * batch["loss_weights"]) / 4.5
        scored, totals = Scored(logits_BLV[one : one + 1], nats_BL, share), Totals(4.5, 6.0)
        loss += my_parts.Smoothed(amount=0.3).share(scored, batch, totals, ())[0]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("MovingAverage", set()),
        ("RoundRobin", {"scan", "microbatches", "task"}),
        ("SigmoidShare", {"mesh", "scan", "microbatches", "decoding"}),
        ("Peakedness", {"mesh", "scan", "decoding", "task"}),
        pytest.param("FactoredMoE", {"scan", "microbatches", "task"}, marks=pytest.mark.slow),
        pytest.param("SquaredRelu", {"mesh", "scan", "task"}, marks=pytest.mark.slow),
        pytest.param("LastFirst", {"mesh", "scan", "task"}, marks=pytest.mark.slow),
    ],
)
def test_the_parts_of_the_page_pass_the_checks(my_parts, name, left_out):
    trial = Trial(getattr(my_parts, name)())
    for one in CHECKS:
        if one in left_out:
            continue
        result = check(one, trial)
        assert result.passed is not False, f"{one}: {result.text}"
        assert "none was seen to look ahead" not in result.text
        assert one != "decoding" or result.passed


def test_costs_follow_from_the_matrices_of_an_expert(my_parts):
    moe = my_parts.FactoredMoE(num_experts=4, num_selected_experts=2, expert_dim=32, rank=8)
    [experts] = [cost for cost in moe.costs(Dims(16), 64, "float32") if cost.kind == "experts"]
    assert experts.flops == 2 * 2 * (16 * 8 + 8 * 32 + 32 * 16)


def test_experts_of_the_page_run_in_every_way(my_parts):
    blocks = [
        my_parts.FactoredMoE(num_experts=4, num_selected_experts=2, expert_dim=32, run_experts=way)
        for way in ("einsum", "gather", "ragged")
    ]
    params = init_parameters(jax.random.key(0), blocks[0].specs(Dims(16)))
    x = jax.random.normal(jax.random.key(1), (2, 12, 16))
    reference, *others = (moe_block(params, x, moe)[0] for moe in blocks)
    assert np.abs(reference).max() > 0.1
    for given in others:
        np.testing.assert_allclose(given, reference, atol=1e-5)


def test_experts_without_a_matrix_cost_no_products():
    class Vectors(MoE):
        def expert_specs(self, dims):
            shape, axes = (self.num_experts, dims.model_dim), ("expert", "model")
            return {"scale": ParameterSpec(shape, axes, ones, "experts")}

    costs = Vectors(num_experts=4).costs(Dims(16), 64, "float32")
    assert [cost.flops for cost in costs if cost.kind == "experts"] == [0]


def test_the_page_lists_the_checks():
    text = (DOCS / "extending.md").read_text(encoding="utf-8")
    section = text[text.index("## Check it") :]
    listed = re.findall(r"^\| (\w+) \|", section, re.MULTILINE)
    assert listed == ["check", *dict.fromkeys(name.split(",")[0] for name in CHECKS)]


def test_the_api_page_is_what_its_tool_writes():
    assert PAGE.read_text(encoding="utf-8") == make_page(), "run: python -m docs.make_api"


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_check_of_links_sees_headings_and_not_code():
    page = "# One\n## The 675B `model`, on 2,048 chips\n```\n# a comment\n```\n"
    assert anchors(page) == {"one", "the-675b-model-on-2048-chips"}


def test_the_index_lists_every_page():
    linked = re.findall(r"\]\(([\w.]+\.md)\)", (DOCS / "index.md").read_text(encoding="utf-8"))
    assert {path.name for path in DOCS.glob("*.md")} - {"index.md"} <= set(linked)


@pytest.mark.parametrize(("name", "command"), [("test", ".ci/run"), ("weekly", "make test-all")])
def test_workflows_run_the_tests(name, command):
    text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    [job] = workflow["jobs"].values()
    assert job["steps"][-1] == {"run": command}
    if name == "test":  # on the oldest supported Python
        oldest = re.search(r'python_requires=">=([\d.]+)"', (ROOT / "setup.py").read_text())
        assert oldest and job["steps"][1]["with"]["python-version"] == oldest[1]


def test_the_study_of_the_page_is_whole():
    [code] = code_of("studies.md")
    names = {"__file__": "mine/router_precision/study.py"}
    exec(code, names)
    study = names["STUDY"]
    assert study.name == "router_precision"
    for arm, dtype in (("float32", "float32"), ("bfloat16", "bfloat16")):
        config = study.experiment("smoke", arm, 0)
        assert config.model.part["moe"].router.dtype == dtype
    assert study.seeds == (0, 1, 2)


def test_the_architecture_of_the_page_is_written_and_read(tmp_path, monkeypatch):
    names = {}
    for code in code_of("architectures.md"):
        exec(code, names)
    family = names["MY_MODEL"]
    page = types.SimpleNamespace(MY_MODEL=family, RULES=names["RULES"])
    monkeypatch.setitem(sys.modules, "the_page", page)
    path = "the_page:MY_MODEL"
    config = from_config_dict(names["get_config"]())
    params = init_parameters(jax.random.key(0), config.model.specs())
    moe_jax.to_hf(config, params, tmp_path / "hf", family=path)
    again, same = moe_jax.from_hf(tmp_path / "hf", family=path)
    assert again.model == config.model
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, same))
    for wrong, message in (
        ("the_page:RULES", r"a family must be a .*: 'the_page:RULES' is "),
        ("the_page:NOTHING", r"must be importable: 'the_page:NOTHING' gives AttributeError"),
        ("", r"architectures that can be read .* model_type='my_model'"),
    ):
        with pytest.raises(ValueError, match=message):
            moe_jax.from_hf(tmp_path / "hf", family=wrong)
    # A file cannot name a module to import.
    settings = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"model_type": path}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"model_type='the_page:MY_MODEL'"):
        moe_jax.from_hf(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"only --family may name .* by 'the_page:MY_MODEL'"):
        trusted("", path)
    assert (trusted(path, "llama"), trusted("", "llama")) == (path, "llama")


def test_the_table_of_models_is_that_of_the_configs():
    assert make_models.make_page() == make_models.PAGE.read_text(encoding="utf-8")
