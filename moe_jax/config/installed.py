"""Where this library is: in a checkout, or installed; and the files it ships beside its modules."""

import pathlib

PACKAGE = pathlib.Path(__file__).parents[1]
LFS_SIGN = "version https://git-lfs.github.com/spec/"


def in_checkout() -> bool:
    """Whether the library runs from a clone of its repository, installed as editable or not."""
    return (PACKAGE.parent / "setup.py").is_file() and (PACKAGE.parent / "configs").is_dir()


def home() -> pathlib.Path:
    """The folder of `configs/`: the checkout's root, or a folder of the installed package."""
    return PACKAGE.parent if in_checkout() else PACKAGE / "shipped"


def install_command(extra: str) -> str:
    """The command that installs an extra of `setup.py` here."""
    if in_checkout():
        return f"pip install -e '{PACKAGE.parent}[{extra}]'"
    return f"pip install 'moe_jax[{extra}]'"


def require_local(name: str, path: str) -> None:
    """Refuses the URL of a bucket, which `pathlib` would take for a local folder.

    Args:
      name: of the flag or setting.
      path: its value; a word and a colon may come first, as in `jsonl:DIR`.

    Raises:
      ValueError: it contains "://".
    """
    if "://" in path:
        raise ValueError(
            f"Paths must be on a mounted file system: {name}={path} is a URL. "
            "Mount the bucket (gcsfuse, mountpoint-s3, s3fs) or copy it, and pass that path."
        )


def is_lfs_pointer(text: str | bytes) -> bool:
    """Whether a file is the pointer that Git LFS leaves if it did not fetch the content."""
    if isinstance(text, str):
        return text.startswith(LFS_SIGN)
    return text.startswith(LFS_SIGN.encode())
