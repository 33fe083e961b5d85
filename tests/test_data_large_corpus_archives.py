"""Reading package archives without unpacking them."""

import gzip
import io
import shutil
import subprocess
import tarfile
import zipfile

import pytest

from moe_jax.data.large_corpus import archives

FILES = {"b/two.txt": b"2", "a/one.txt": b"1", "a/skip.md": b"no"}


def tar_bytes(files, mode="w:gz"):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:
        for name, contents in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    return stream.getvalue()


def zip_bytes(files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, contents in files.items():
            archive.writestr(name, contents)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "pack"), [("x.tgz", tar_bytes), ("x.tar.gz", tar_bytes), ("x.whl", zip_bytes)]
)
def test_wanted_files_are_read_in_the_order_of_their_paths(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(FILES))
    read = archives.read_files(tmp_path / name, archives.selector(".txt"))
    assert list(read.items()) == [("a/one.txt", b"1"), ("b/two.txt", b"2")]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")
def test_a_deb_is_read_without_unpacking(tmp_path):
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: n <n@example.org>\nDescription: x\n"
    )
    (root / "usr").mkdir()
    (root / "usr" / "one.txt").write_text("1")
    (root / "usr" / "link.txt").symlink_to("one.txt")
    command = ["dpkg-deb", "--build", "--root-owner-group", root, tmp_path / "x.deb"]
    subprocess.run(command, check=True, capture_output=True)
    read = archives.read_files(tmp_path / "x.deb", archives.selector(".txt"))
    assert read == {"usr/one.txt": b"1"}


@pytest.mark.parametrize("name", ["x.deb", "x.tgz", "x.whl"])
def test_a_damaged_archive_is_an_error(tmp_path, name):
    (tmp_path / name).write_bytes(b"no archive")
    with pytest.raises(OSError, match=r"is damaged|failed with status"):
        archives.read_files(tmp_path / name, archives.selector(".txt"))


def test_compressed_files_are_decompressed(tmp_path):
    (tmp_path / "x.tgz").write_bytes(tar_bytes({"./a.md.gz": gzip.compress(b"text")}))
    assert archives.read_files(tmp_path / "x.tgz", archives.selector(".gz")) == {"a.md.gz": b"text"}


@pytest.mark.parametrize(
    ("inner", "pack"),
    [("src.zip", zip_bytes), ("src.tar.xz", lambda files: tar_bytes(files, "w:xz"))],
)
def test_an_archive_inside_a_package_is_read(tmp_path, inner, pack):
    (tmp_path / "x.tgz").write_bytes(tar_bytes({f"usr/{inner}": pack(FILES)}))
    read = archives.read_nested_files(
        tmp_path / "x.tgz", archives.selector(inner), archives.selector(".txt", under="a/")
    )
    assert read == {"a/one.txt": b"1"}


def test_a_package_without_its_inner_archive_is_an_error(tmp_path):
    (tmp_path / "x.tgz").write_bytes(tar_bytes(FILES))
    with pytest.raises(OSError, match=r"one inner archive in .*x\.tgz, found \[\]"):
        archives.read_nested_files(
            tmp_path / "x.tgz", archives.selector(".zip"), archives.selector("")
        )


def test_a_selector_asks_for_the_end_the_beginning_and_the_middle():
    wanted = archives.selector(".c", ".h", under="src/", skip=("/test/",))
    paths = ["src/a.c", "src/b.h", "src/c.o", "lib/a.c", "src/test/a.c"]
    assert [path for path in paths if wanted(path)] == ["src/a.c", "src/b.h"]


def test_the_fair_order_depends_on_the_names_alone():
    files = {f"{i}": b"" for i in range(20)}
    order = list(archives.in_hash_order(files))
    assert order == list(archives.in_hash_order(dict(reversed(files.items()))))
    assert order != list(files.items())
    assert dict(order) == files
