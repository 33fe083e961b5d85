"""Set up before JAX starts: eight devices on the CPU, so that sharding is tested anywhere.

Hypothesis tries the same examples in every run, and a busy machine fails none of them.
"""

import os
import pathlib

import hypothesis
import jax
import pytest
from absl import flags

ROOT = pathlib.Path(__file__).parent.parent

jax.config.update("jax_num_cpu_devices", 8)
# Tests mostly wait for the compiler; their programs run only for a moment. Without fusion emitters
# a training step compiles in half the time; without splitting, in nine tenths of that. A jaxlib
# that no longer knows a flag would abort.
FLAGS = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 13):
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
# Reuse programs that an earlier test compiled, even the smallest: every test module needs the
# same hundreds of them.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")

# Some libraries read absl flags, which fails until an absl app has parsed them.
flags.FLAGS.mark_as_parsed()


@pytest.fixture(autouse=True, scope="module")
def free_programs(request):
    """Frees a module's programs after its tests: a process that kept all of them would crash.

    A compiled training step takes more than a thousand memory maps. Linux allows a process 65,530.
    """
    yield
    for value in vars(request.module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    jax.clear_caches()
