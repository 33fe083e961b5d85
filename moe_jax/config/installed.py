"""Where this library stands: in a checkout, or installed; what it ships beside its modules."""

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
    """How the packages of an extra of `setup.py` are installed, as a command that works here."""
    if in_checkout():
        return f"pip install -e '{PACKAGE.parent}[{extra}]'"
    return f"pip install 'moe_jax[{extra}]'"


def require_local(name: str, path: str) -> None:
    """Refuses the URL of a bucket, which `pathlib` would take for a folder of that name.

    Args:
      name: of the flag or setting.
      path: what it is set to; a word and a colon may stand before it, as in `jsonl:DIR`.

    Raises:
      ValueError: it has "://" in it.
    """
    if "://" in path:
        raise ValueError(
            f"Paths are on a mounted file system: {name}={path} is a URL. "
            "Mount the bucket (gcsfuse, mountpoint-s3, s3fs) or copy it, and pass that path."
        )


def is_lfs_pointer(text: str | bytes) -> bool:
    """Whether a file holds the pointer that Git LFS leaves where it did not fetch the content."""
    if isinstance(text, str):
        return text.startswith(LFS_SIGN)
    return text.startswith(LFS_SIGN.encode())
