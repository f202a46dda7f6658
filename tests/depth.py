"""How many examples a property test draws: its own number by default, 20 times that under --hypothesis-profile=deep."""

from hypothesis import settings

DEFAULT_EXAMPLES = 100  # of the default profile (conftest.py)


def examples(number: int) -> int:
    return number * settings().max_examples // DEFAULT_EXAMPLES
