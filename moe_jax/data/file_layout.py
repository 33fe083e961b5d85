"""Which files under a path are a corpus, and the domain and split of each."""

import dataclasses
import glob
import json
import os
import pathlib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from moe_jax.config.check import require
from moe_jax.data.documents import HELDOUT, TRAIN

SUFFIXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "text": (".txt", ".md"),
        "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
        "parquet": (".parquet",),
        "arrow": (".arrow",),
    }
)
ALL_SUFFIXES = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
# Names of files and folders with a held-out split; the first name found is held out.
HELDOUT_NAMES = ("validation", "valid", "val", "dev", "eval", "heldout", "test")
# Matches `wiki.train` as (`wiki`, `train`), and `train` as (None, `train`).
_SPLIT = re.compile(rf"(?:(.+)[._-])?(train|{'|'.join(HELDOUT_NAMES)})", re.IGNORECASE)
_SHARD = re.compile(r"-\d+-of-\d+$")
_NUMBERED = re.compile(r"(.+)-(\d{5,})$")


class _File(NamedTuple):
    """A file, and the parts of its path: folders, then the file name without suffix.

    The name of a text file is in `document`: it names no domain, but may name a split.
    """

    path: pathlib.Path
    parts: tuple[str, ...]
    document: str = ""

    @property
    def splits(self) -> list[tuple[str, str, str]]:
        """(part, name before the split, split) for each part that names a split."""
        named = ((part, _SPLIT.fullmatch(part)) for part in (*self.parts, self.document))
        return [(part, match[1] or "", match[2].lower()) for part, match in named if match]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The files of a corpus.

    Attributes:
        kind: a key of `SUFFIXES`.
        domains: names of the domains, in the order of their first files.
        files: by split, then by domain. Without files under `heldout`, whole documents (by hash)
            or the ends of documents are held out.
    """

    kind: str
    domains: tuple[str, ...]
    files: Mapping[str, Mapping[str, tuple[pathlib.Path, ...]]]

    @property
    def has_records(self) -> bool:
        """Whether documents are lines of JSON."""
        return self.kind == "jsonl"

    @property
    def has_splits(self) -> bool:
        """Whether the held-out split has its own files."""
        return bool(self.files[HELDOUT])


def layout_of(path: pathlib.Path, kind: str = "") -> Layout:
    """Finds the files of a corpus.

    * One file is one domain, named after it.
    * In a folder of text files, the files directly in it are one domain, named after the folder.
    * In a folder of JSON lines or tables each file is a domain; `NAME-00000-of-00009.parquet` is a
      part of the domain NAME. So is `NAME-00003.parquet`, if beside it the numbers after NAME run
      from 0 without gaps; a date is no such number.
    * A subfolder is one domain, whatever it contains.
    * If some files or folders are called `train` and others `validation` (or another of
      `HELDOUT_NAMES`), these are splits, not domains: the first is trained on, the second is held
      out. So are `wiki.train` and `wiki.validation`, of the domain `wiki`.
    * A Hugging Face dataset is one domain. Its splits follow the same rule, as folders do.
    * A pattern such as `notes/*.jsonl` is the folder before its first `*`, `?` or `[`, with only
      the files that it matches.

    Hidden files, including `._x` of macOS, are skipped; so are .md files beside data.

    Args:
        path: a file, a folder, or a pattern.
        kind: a key of `SUFFIXES`; "": detected.

    Raises:
        ValueError: there are no files of that kind, there are several kinds, or a file is reached
            twice.
        OSError: a folder cannot be read.
    """
    matched = files_of_pattern(path)
    require(
        path.exists() or bool(matched),
        "A corpus must be 'embedded', the path of a file or folder, 'packed:DIR' or 'tfds:NAME'",
        f"there is no {str(path)!r}",
        "Correct config.data.corpus",
    )
    if path.is_file():
        kind = kind or _kind_of(path.name)
        require(
            bool(kind),
            f"A corpus file must be one of {ALL_SUFFIXES}",
            str(path),
            f"Convert it, or name its kind, as in config.data.corpus=text:{path}",
        )
        return Layout(
            kind, (_stem(path.name, kind),), {TRAIN: {_stem(path.name, kind): (path,)}, HELDOUT: {}}
        )
    dataset = _dataset_files(path) if kind in ("", "arrow") else []
    if dataset:
        kind, files = "arrow", dataset
    elif matched:
        wild = next(n for n, part in enumerate(path.parts) if glob.has_magic(part))
        path = pathlib.Path(*path.parts[:wild])
        kind, files = _choose_kind(path, matched, kind)
    else:
        kind, files = _choose_kind(path, _walk(path), kind)
    _check_reached_once(files)
    return _sort_by_split(path, kind, files)


def files_of_pattern(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that a pattern matches, sorted; [] if the path exists or is no pattern."""
    if path.exists() or not glob.has_magic(str(path)):
        return []
    found = map(pathlib.Path, glob.glob(str(path), recursive=True))
    return sorted(one for one in found if one.is_file())


def _walk(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files below a folder except hidden ones, sorted by path."""

    def fail(error: OSError) -> None:
        raise error

    found, entered = [], {folder.resolve()}
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        visible = sorted(name for name in folders if not name.startswith("."))
        for name in visible:
            target = pathlib.Path(parent, name).resolve()
            require(
                target not in entered,
                "A corpus must reach each folder only once",
                f"{parent}/{name} is {target} again",
                "Remove the link",
            )
            entered.add(target)
        folders[:] = visible
        found += [pathlib.Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _choose_kind(
    folder: pathlib.Path, paths: list[pathlib.Path], kind: str
) -> tuple[str, list[_File]]:
    by_kind: dict[str, list[pathlib.Path]] = {}
    for path in paths:
        by_kind.setdefault(_kind_of(path.name), []).append(path)
    by_kind.pop("", None)
    if not kind and len(by_kind) > 1 and all(p.suffix == ".md" for p in by_kind.get("text", ())):
        by_kind.pop("text", None)  # A README beside the data.
    examples = [f"{paths[0].relative_to(folder)} ({kind})" for kind, paths in by_kind.items()]
    require(
        bool(kind) or len(by_kind) <= 1,
        "The files of a corpus must be of one kind",
        f"{str(folder)!r} has {', '.join(examples)}",
        "Move the others away, or name the kind, as in "
        f"config.data.corpus={min(by_kind, default='')}:{folder}",
    )
    kind = kind or next(iter(by_kind), "")
    is_prepared = (folder / "features.json").exists()
    require(
        bool(by_kind.get(kind)),
        "A corpus must have files of text, one of "
        f"{', '.join(SUFFIXES.get(kind, (ALL_SUFFIXES,)))}",
        f"none in {str(folder)!r}",
        f"Set config.data.corpus=tfds:{folder}: it looks like a prepared TFDS dataset"
        if is_prepared
        else "Correct config.data.corpus, or set it to 'embedded'",
    )
    names = _names_without_shards(by_kind[kind], kind)
    return kind, [_file_of(path, folder, kind, names[path]) for path in by_kind[kind]]


def _names_without_shards(paths: list[pathlib.Path], kind: str) -> dict[pathlib.Path, str]:
    """The name of each file without suffix and, if it is a part of a domain, without its number."""
    names = {path: _SHARD.sub("", _stem(path.name, kind)) for path in paths}
    numbered = {path: match for path in paths if (match := _NUMBERED.fullmatch(names[path]))}
    numbers: dict[tuple[pathlib.Path, str], set[int]] = {}
    for path, match in numbered.items():
        numbers.setdefault((path.parent, match[1]), set()).add(int(match[2]))
    for path, match in numbered.items():
        found = numbers[path.parent, match[1]]
        if found == set(range(len(found))):
            names[path] = match[1]
    return names


def _file_of(path: pathlib.Path, folder: pathlib.Path, kind: str, name: str) -> _File:
    folders = path.relative_to(folder).parts[:-1]
    return _File(path, folders, name) if kind == "text" else _File(path, (*folders, name))


def _dataset_files(folder: pathlib.Path) -> list[_File]:
    """The arrow files of a Hugging Face dataset, as `save_to_disk` writes it; [] otherwise."""
    if (folder / "dataset_dict.json").is_file():
        splits = _listed(folder / "dataset_dict.json", "splits")
        return [
            _File(file.path, (str(split),))
            for split in splits
            for file in _dataset_files(folder / str(split))
        ]
    if not (folder / "state.json").is_file():
        return []
    entries = _listed(folder / "state.json", "_data_files")
    names = [entry["filename"] for entry in entries if isinstance(entry, dict)]
    return [_File(folder / str(name), ()) for name in names]


def _listed(path: pathlib.Path, name: str) -> list[Any]:
    """The entries that a file of a Hugging Face dataset lists; each must exist.

    Raises:
        ValueError: the file is damaged, or an entry does not exist.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))[name]
        files = [entry["filename"] if isinstance(entry, dict) else str(entry) for entry in entries]
    except (ValueError, KeyError, TypeError):
        entries, files = [], []
    require(
        bool(files),
        f"A Hugging Face dataset must list its {name}",
        f"{path} does not",
        "Copy it again",
    )
    for file in files:
        require(
            (path.parent / file).exists(),
            f"A Hugging Face dataset must have what its {path.name} lists",
            f"there is no {path.parent / file}",
            "Copy or save the dataset again",
        )
    return list(entries)


def _check_reached_once(files: list[_File]) -> None:
    seen: dict[pathlib.Path, pathlib.Path] = {}
    unpacked: dict[pathlib.Path, pathlib.Path] = {}
    for file in files:
        target = file.path.resolve()
        require(
            target not in seen,
            "A corpus must reach each file only once",
            f"{file.path} and {seen.get(target)} are the same",
            "Remove one of them",
        )
        seen[target] = file.path
        suffix = file.path.suffix.lower()
        name = file.path.with_suffix("") if suffix in (".gz", ".zst") else file.path
        require(
            name not in unpacked,
            "A corpus must reach each file only once, packed or not",
            f"{file.path} and {unpacked.get(name)} have the same name",
            "Remove or rename one of them",
        )
        unpacked[name] = file.path
        require(
            file.path.name.isprintable() and _is_unicode(str(file.path)),
            "Names of corpus files must be printable UTF-8",
            ascii(str(file.path)),
            "Rename the file",
        )


def _sort_by_split(folder: pathlib.Path, kind: str, files: list[_File]) -> Layout:
    """Splits files by name if both splits are found, else puts all of them under `train`."""
    splits = [file.splits for file in files]
    # A folder `eval` around all files distinguishes none.
    shared = set(splits[0]).intersection(*splits[1:])
    splits = [[said for said in of_file if said not in shared] for of_file in splits]
    # The names before the splits must match: `bullet-train` and `crash-test` are not splits.
    names = {(before.lower(), split) for of_file in splits for _, before, split in of_file}
    training = {before for before, split in names if split == "train"}
    paired = {split for before, split in names if before in training}
    heldout = next((name for name in HELDOUT_NAMES if name in paired), "")
    sorted_files: dict[str, dict[str, list[pathlib.Path]]] = {TRAIN: {}, HELDOUT: {}}
    domains: dict[str, None] = {}
    for file, of_file in zip(files, splits, strict=True):
        # The outermost split name counts: a file `test` in a folder `train` is training text.
        named = of_file if heldout else []
        split = named[0][2] if named else ""
        require(
            bool(split) or not heldout,
            f"A corpus with the splits train and {heldout} must have no other files",
            str(file.path),
            "Move it away, or set config.data.corpus to the file or folder to train on",
        )
        if split not in ("", "train", heldout):
            continue
        without = {part: before for part, before, said in named if said == split}
        rest = [without.get(part, part) for part in file.parts]
        domain = next(filter(None, rest), "") or folder.resolve().name or "text"
        side = HELDOUT if split and split == heldout else TRAIN
        sorted_files[side].setdefault(domain, []).append(file.path)
        domains[domain] = None
    _check_loose_files(folder, kind, files, domains)
    by_split = {
        side: {domain: tuple(paths) for domain, paths in by_domain.items()}
        for side, by_domain in sorted_files.items()
    }
    return Layout(kind, tuple(domains), by_split)


def _check_loose_files(
    folder: pathlib.Path, kind: str, files: list[_File], domains: dict[str, None]
) -> None:
    """Refuses a domain that is both a subfolder and files beside the subfolders."""
    depth = 0 if kind == "text" else 1
    loose = {
        (file.parts[0] if file.parts else folder.resolve().name): file.path
        for file in files
        if len(file.parts) == depth
    }
    inside = {file.parts[0]: file.path for file in files if len(file.parts) > depth}
    for domain in domains:
        require(
            domain not in loose or domain not in inside,
            "A domain must be either a file or a folder",
            f"{loose.get(domain)} and {inside.get(domain)} are both {domain!r}",
            "Rename one of them",
        )


def _kind_of(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, ends in SUFFIXES.items() if lower.endswith(ends)), "")


def _stem(name: str, kind: str) -> str:
    ends = [suffix for suffix in SUFFIXES[kind] if name.lower().endswith(suffix)]
    return name[: -len(max(ends, key=len))] if ends else pathlib.Path(name).stem


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
