"""Set before JAX starts: eight devices on the CPU, so that sharding is tested anywhere."""

import pathlib

import jax
from absl import flags

ROOT = pathlib.Path(__file__).parent.parent

jax.config.update("jax_num_cpu_devices", 8)
# Programs that an earlier run of the tests has compiled are not compiled again.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Libraries that read absl flags refuse to before an absl app has parsed them.
flags.FLAGS.mark_as_parsed()
