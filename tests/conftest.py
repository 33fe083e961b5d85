"""Set before JAX starts: eight devices on the CPU, so that sharding is tested anywhere.

Hypothesis tries the same examples in every run, and none fails because the machine is busy.
"""

import os
import pathlib

import hypothesis
import jax
import pytest
from absl import flags

ROOT = pathlib.Path(__file__).parent.parent

jax.config.update("jax_num_cpu_devices", 8)
# Tests mostly wait for the compiler, and their programs run but a moment. Without fusion emitters a
# training step compiles in half the time, and unsplit in nine tenths of that; a jaxlib that no
# longer knows a flag would abort.
FLAGS = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 13):
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
# Programs that an earlier test has compiled are not compiled again, the smallest ones too: every
# module of tests needs the same hundreds of them.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")

# Libraries that read absl flags refuse to before an absl app has parsed them.
flags.FLAGS.mark_as_parsed()


@pytest.fixture(autouse=True, scope="module")
def free_programs(request):
    """Frees the programs of a module after it: a process that keeps those of all would crash.

    A compiled training step takes more than a thousand memory maps, of which Linux gives a process
    65,530.
    """
    yield
    for value in vars(request.module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    jax.clear_caches()
