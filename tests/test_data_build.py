"""The command that fetches and builds the large corpus, with stand-in sources."""

import subprocess
import sys

import pytest

from moe_jax.data import build
from moe_jax.data.large_corpus import packages, readers, sources

WORDS, HELP = packages.Package("deb", "words"), packages.Package("npm", "help", "1")
TEXT = readers.Text("a", "word " * 50)


def source(domain, *needed):
    return sources.Source(domain, needed, "MIT", lambda paths: iter([TEXT]))


TABLE = (source("en", WORDS), source("tech", WORDS), source("tech", HELP), source("nl", HELP))


def downloaders(**available):
    script = "open('archive.tgz', 'w').write('archive')"
    return {
        kind: packages.Downloader(
            f"{kind}-get", lambda kind=kind: available[kind],
            lambda package: [sys.executable, "-c", script], "Retry.",
        )
        for kind in available
    }  # fmt: skip


def test_every_package_is_fetched_once(tmp_path):
    fetched = build.fetch_packages(
        TABLE, tmp_path, skip_missing=False, downloaders=downloaders(deb=True, npm=True)
    )
    assert set(fetched) == {WORDS, HELP}
    assert all(path.exists() for path in fetched.values())


def test_a_missing_program_says_what_would_be_lacking(tmp_path):
    with pytest.raises(ValueError) as error:
        build.fetch_packages(
            TABLE, tmp_path, skip_missing=False, downloaders=downloaders(deb=True, npm=False)
        )
    message = str(error.value)
    assert "2 packages, of which 1 cannot be downloaded" in message
    assert "the domains ['nl'] would be missing and ['tech'] incomplete" in message
    assert "--skip_missing" in message
    assert "npm:help: npm-get not found" in message


def test_the_missing_can_be_skipped(tmp_path):
    fetched = build.fetch_packages(
        TABLE, tmp_path / "work", skip_missing=True, downloaders=downloaders(deb=True, npm=False)
    )
    assert set(fetched) == {WORDS}
    sizes = build.build(TABLE, fetched, tmp_path / "out", max_code_mb=1.0)
    assert [size.domain for size in sizes] == ["en", "tech"]


def run_command(*arguments):
    command = [sys.executable, "-W", "error", "-m", "moe_jax.data.build", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_asks_for_out():
    done = run_command()
    assert done.returncode != 0
    assert "--out must be given" in done.stdout + done.stderr


def test_the_command_refuses_an_existing_directory_before_it_fetches(tmp_path):
    (tmp_path / "kept").touch()
    done = run_command(f"--out={tmp_path}", f"--work={tmp_path}/work")
    assert done.returncode != 0
    assert "is there already. Name another" in done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
