"""Error messages for settings: the rule, the values that broke it, and what to change."""


def require(condition: bool, rule: str, got: str, fix: str) -> None:
    """Raises `ValueError` unless the condition holds.

    Args:
      condition: what must be true.
      rule: the rule in words, naming the setting.
      got: the values that broke it.
      fix: what to change.

    Raises:
      ValueError: "<rule>: <got>. <fix>."
    """
    if not condition:
        raise ValueError(f"{rule}: {got}. {fix}.")
