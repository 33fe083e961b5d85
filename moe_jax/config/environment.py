"""Checks and sets environment variables, before JAX reads them."""

from collections.abc import Mapping, MutableMapping

XLA_ORDER = "xla_cpu_enable_concurrency_optimized_scheduler"


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuses settings of JAX with which equal configs would not give equal runs.

    Raises:
      ValueError: with the name of the variable.
    """
    wanted = {
        "JAX_DEFAULT_PRNG_IMPL": ("threefry2x32",),
        "JAX_THREEFRY_PARTITIONABLE": ("1", "true", "t", "yes", "y", "on"),
        "JAX_ENABLE_X64": ("0", "false", "f", "no", "n", "off"),
    }
    for name, values in wanted.items():
        value = environment.get(name, "")
        if value and value.lower() not in values:
            raise ValueError(
                f"Runs use one random generator and one precision, whatever the environment: "
                f"{name}={value}, {values[0]} is used. Unset {name}."
            )


def order_collectives(environment: MutableMapping[str, str], processes: bool = False) -> None:
    """Makes XLA run the collectives of several CPU devices in one order.

    By default XLA starts independent collectives at once, and each device chooses its own order.
    With too few threads, the devices of a process then wait for each other forever. Gloo, which
    matches the collectives of two processes by their order, aborts both (jaxlib 0.10.2: unrolled
    layers, two microbatches). XLA reads this option only from the environment, before its first
    program.

    Args:
      environment: of the process.
      processes: whether there are several.
    """
    several = processes or environment.get("JAX_NUM_CPU_DEVICES", "1") not in ("", "1")
    flags_of_xla = environment.get("XLA_FLAGS", "")
    if several and XLA_ORDER not in flags_of_xla:
        environment["XLA_FLAGS"] = f"{flags_of_xla} --{XLA_ORDER}=false".strip()
