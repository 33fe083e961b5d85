"""Set before JAX starts: eight devices on the CPU, so that sharding is tested anywhere."""

import jax
from absl import flags

jax.config.update("jax_num_cpu_devices", 8)

# Libraries that read absl flags refuse to before an absl app has parsed them.
flags.FLAGS.mark_as_parsed()
