"""Failures that a learner understands: what was called, what a refusal has to say, and whose code is under test."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager

from minivllm.learn_check import CALLS, is_mine


@contextmanager
def refused(call: str, *words: object) -> Iterator[None]:
    """The block, which makes this call, ends with an assert whose message names all of the words, in any order.

    Without words any message will do. A blank says "your turn", and an error of another kind is told as what it is.
    """
    try:
        yield
    except AssertionError as error:
        said = str(error).strip()
    else:
        raise AssertionError(f"{call} has to stop with an assert, and nothing was raised")
    missing = [str(word) for word in words if not re.search(rf"(?<!\d){re.escape(str(word))}(?!\d)", said)]
    assert said, f"{call} stops with an assert that has no message"
    assert not missing, f"{call} stops with an assert whose message is {said!r} and does not name {' and '.join(missing)}"


@contextmanager
def told_as(calls: list[str]) -> Iterator[None]:
    """An error in the block takes along which calls came before it: `learn check` prints them as the example."""
    try:
        yield
    except Exception as error:
        error.add_note(CALLS + "; ".join(calls))
        raise


def is_learners(thing: object) -> bool:
    """Whether this function or class stands in a learner's file, which may say the same in other words."""
    return is_mine(inspect.getsourcefile(thing) or "")
