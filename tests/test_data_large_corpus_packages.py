"""Packages are fetched once, whole and checked. Stand-in downloaders need no network."""

import sys

import pytest

from moe_jax.data.large_corpus import packages, sources

PACKAGE = packages.Package("deb", "words", "1")


def downloader(script, available=True):
    """A downloader that runs a Python script in the download directory."""
    return {
        "deb": packages.Downloader(
            "words-get", lambda: available, lambda package: [sys.executable, "-c", script], "Retry."
        )
    }


WRITE = "open('words_1.deb', 'w').write('archive')"
FAIL = "import sys; sys.exit('no route to host')"


def test_a_package_is_downloaded_once(tmp_path):
    archive = packages.fetch(PACKAGE, tmp_path, downloaders=downloader(WRITE))
    assert archive.name == "words_1.deb"
    assert archive.read_text() == "archive"
    assert packages.fetch(PACKAGE, tmp_path, downloaders=downloader(FAIL)) == archive


@pytest.mark.parametrize("damage", ["arch", "archive and more"])
def test_an_archive_that_changed_on_disk_is_downloaded_again(tmp_path, damage):
    archive = packages.fetch(PACKAGE, tmp_path, downloaders=downloader(WRITE))
    archive.write_text(damage)
    again = packages.fetch(PACKAGE, tmp_path, downloaders=downloader(WRITE))
    assert again.read_text() == "archive"


def test_a_download_that_was_cut_short_is_done_again(tmp_path):
    cut_short = "open('words_1.deb', 'w').write('arc'); raise SystemExit(1)"
    with pytest.raises(packages.FetchError, match="status 1"):
        packages.fetch(PACKAGE, tmp_path, downloaders=downloader(cut_short))
    archive = packages.fetch(PACKAGE, tmp_path, downloaders=downloader(WRITE))
    assert archive.read_text() == "archive"
    assert [path.name for path in tmp_path.iterdir()] == ["deb-words"]


def test_a_failing_downloader_is_quoted(tmp_path):
    with pytest.raises(packages.FetchError, match=r"deb:words: .*Retry\. no route to host"):
        packages.fetch(PACKAGE, tmp_path, downloaders=downloader(FAIL))


def test_a_missing_program_is_named(tmp_path):
    with pytest.raises(packages.FetchError, match="deb:words: words-get not found"):
        packages.fetch(PACKAGE, tmp_path, downloaders=downloader(WRITE, available=False))


def test_scoped_npm_names_stay_inside_the_work_directory(tmp_path):
    scoped = packages.Package("npm", "@scope/name", "1")
    archive = packages.fetch(scoped, tmp_path, downloaders={"npm": downloader(WRITE)["deb"]})
    assert archive.parent.parent == tmp_path


def test_a_package_that_differs_from_the_recorded_one_is_warned_of(tmp_path):
    archive = packages.fetch(PACKAGE, tmp_path, downloaders=downloader(WRITE))
    same = {"deb:words": packages.sha256_of(archive)}
    assert packages.warn_of_changes({PACKAGE: archive}, same) == ()
    with pytest.warns(UserWarning, match=r"deb:words is words_1\.deb, not the one"):
        changed = packages.warn_of_changes({PACKAGE: archive}, {"deb:words": "0"})
    assert changed == (PACKAGE,)


def test_every_package_of_the_table_is_recorded():
    needed = {str(package) for source in sources.SOURCES for package in source.packages}
    assert needed == set(packages.recorded_sha256())


def test_npm_and_pip_packages_are_pinned():
    for source in sources.SOURCES:
        for package in source.packages:
            assert (package.version == "") == (package.kind == "deb"), package


def test_the_table_has_32_domains():
    assert len({source.domain for source in sources.SOURCES}) == 32
