"""The guard of the exercises: each blank fails with "your turn", the reference passes, and every listed wrong answer is caught."""

from __future__ import annotations

import ast
import re

import pytest
from fork_checks import ROOT, Checker
from wrong_answers import WRONG

from minivllm.blanks import blank, count_code_lines, find, fingerprint, is_blank
from minivllm.exercises import EXERCISES, LESSONS, Exercise

NAMES = [exercise.name for exercise in EXERCISES]


@pytest.fixture(scope="module")
def checker():
    one = Checker()
    yield one
    one.close()


def reference(exercise: Exercise) -> str:
    return (ROOT / "minivllm" / f"{exercise.module}.py").read_text(encoding="utf-8")


def blanked(exercise: Exercise) -> str:
    source = reference(exercise)
    for name in exercise.blanks:
        source = blank(source, name, exercise.module)
    return source


def function_of(test_id: str) -> ast.FunctionDef:
    """The function that an id names."""
    path, name = test_id.split("::")
    found = [node for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body
             if isinstance(node, ast.FunctionDef) and node.name == name.split("[")[0]]
    assert found, f"{test_id} does not exist"
    return found[0]


def promises(exercise: Exercise) -> set[str]:
    return {(ast.get_docstring(function_of(test)) or "").splitlines()[0] for test in exercise.tests}


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_blank_fails_reference_passes_and_wrong_answers_are_caught(exercise, checker):
    """An open blank says whose turn it is, the reference passes, and each wrong answer breaks a promise that is named."""
    right, wrong = reference(exercise), WRONG[exercise.name]
    for old, _ in wrong:
        assert right.count(old) == 1, f"{right.count(old)} places of {exercise.module}.py, instead of one, read {old!r}"
    answers = [right.replace(old, new) for old, new in wrong]
    around = {fingerprint(source, exercise.blanks, exercise.module) for source in (right, *answers)}
    assert len(around) == 1, "a wrong answer changes code outside of the exercise's functions"
    untouched, passed, *stories = checker.run(exercise.module, [blanked(exercise), right, *answers], exercise.tests)
    assert re.match(rf"your turn: ({'|'.join(map(re.escape, exercise.blanks))}), about \d+ lines?$", untouched.broken), (
        f"the untouched exercise says {untouched.broken!r}")
    assert untouched.promise in promises(exercise), f"the untouched exercise promises {untouched.promise!r}"
    assert not passed.broken, f"the reference fails: {passed.broken}"
    for (_, new), story in zip(wrong, stories):
        assert story.broken, f"the wrong answer {new!r} passes"
        assert story.promise in promises(exercise), f"the wrong answer {new!r} breaks {story.promise!r}"
        assert not story.broken.startswith(("assert ", "the tests ended")), f"{new!r} is told as {story.broken!r}"


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_an_exercise_can_be_done_from_what_is_shown(exercise):
    """Every blank has a docstring and three lines of body or more, and two hints stand behind it, none of them empty."""
    num_lines, source = 0, reference(exercise)
    for name in exercise.blanks:
        node = find(source, name, exercise.module)
        assert ast.get_docstring(node), f"{name} has no docstring"
        lines = count_code_lines(source.split("\n")[node.body[0].end_lineno:node.end_lineno])
        assert lines <= 15, f"{name} has {lines} lines"
        num_lines += lines
        assert is_blank(find(blank(source, name, exercise.module), name, exercise.module)), f"{name} is not blank"
    assert num_lines >= 3, f"{num_lines} lines to write are no exercise"
    assert len(exercise.hints) >= 2 and all(hint.strip() for hint in exercise.hints), f"{len(exercise.hints)} hints"
    assert len({old + new for old, new in WRONG[exercise.name]}) >= 2, f"{len(WRONG[exercise.name])} wrong answers"


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_the_tests_of_an_exercise_read_as_promises(exercise):
    """Every test exists once in the list, has a promise without code in it, and a sentence at each of its assertions."""
    assert len(set(exercise.tests)) == len(exercise.tests), f"a test is listed twice: {exercise.tests}"
    for test in exercise.tests:
        function = function_of(test)
        promise = (ast.get_docstring(function) or "").splitlines()[0]
        assert promise.endswith("."), f"{test} promises {promise!r}, which is no sentence in one line"
        assert "()" not in promise and "`" not in promise, f"{test} has code in its promise: {promise!r}"
        silent = [node.lineno for node in ast.walk(function) if isinstance(node, ast.Assert) and node.msg is None]
        assert not silent, f"{test} asserts without a sentence in lines {silent}"
        raises = [node.lineno for node in ast.walk(function) if isinstance(node, ast.Attribute) and node.attr == "raises"]
        assert not raises, f"{test} has pytest.raises in lines {raises}, which fails with a regular expression: see telling.py"


def test_every_lesson_has_its_exercises_in_order():
    """Names sort as they stand, no two share a number, every lesson has one, and wrong answers belong to an exercise."""
    assert sorted(NAMES) == NAMES, "the exercises are not in order"
    numbers = [exercise.number for exercise in EXERCISES]
    assert len(set(numbers)) == len(numbers), f"a number is there twice: {numbers}"
    assert {exercise.lesson for exercise in EXERCISES} == set(LESSONS), "lessons and exercises differ"
    assert set(WRONG) == set(NAMES), f"wrong answers without an exercise, or without any: {set(WRONG) ^ set(NAMES)}"
    letters = {exercise.lesson: [other.number[-1].isalpha() for other in EXERCISES if other.lesson == exercise.lesson]
               for exercise in EXERCISES}
    assert all(all(has) if len(has) > 1 else not has[0] for has in letters.values()), "a letter tells several of one lesson apart"


def test_no_two_exercises_blank_one_function():
    """A function belongs to one exercise, so that solving one never closes another."""
    blanks = [(exercise.module, name) for exercise in EXERCISES for name in exercise.blanks]
    assert len(set(blanks)) == len(blanks), f"{len(blanks)} blanks of {len(set(blanks))} functions"
