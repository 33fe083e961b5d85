"""What is said of a vocabulary that its tokenizer hardly uses."""

import logging

import pytest

from moe_jax.config import from_config_dict
from moe_jax.config.file import load_config
from moe_jax.data.tokenizers import open_tokenizer
from moe_jax.training import loop
from moe_jax.training.vocabulary import warn_of_unused_ids
from tests.tiny_run import tiny_config

BYTES = open_tokenizer("byte")


def warnings_of(config, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_unused_ids(config, BYTES)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "olmoe", "switch_base"])
def test_published_sizes_on_bytes_are_warned_of_and_small_presets_are_not(name, caplog):
    config = from_config_dict(load_config(f"configs/{name}.py"))
    [said] = warnings_of(config, caplog)
    assert said.startswith(f"model.vocab_size={config.model.vocab_size}, and batches have 384 ids")
    assert "data.corpus='embedded'" in said and "or model.vocab_size=384." in said
    for preset in ("tiny", "smoke"):
        small = from_config_dict(load_config(f"configs/{name}.py:{preset}"))
        assert warnings_of(small, caplog) == []


def test_twice_the_ids_is_the_bound(caplog):
    assert warnings_of(tiny_config({"model": {"vocab_size": 767}}), caplog) == []
    assert len(warnings_of(tiny_config({"model": {"vocab_size": 768}}), caplog)) == 1


def test_a_run_warns_before_it_writes(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(loop, "only_run", lambda workdir: 1 / 0)
    with caplog.at_level(logging.WARNING), pytest.raises(ZeroDivisionError):
        loop.train(tiny_config({"model": {"vocab_size": 1000}}), tmp_path / "run")
    assert [record.getMessage()[:21] for record in caplog.records] == ["model.vocab_size=1000"]
    assert not (tmp_path / "run").exists()
