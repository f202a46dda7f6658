"""Exercises on minivllm's own code: a copy of a module with some functions left open, which shadows the module while it is there.

    python -m minivllm.learn list            which exercises there are, and how far you are
    python -m minivllm.learn start 7         write mine/block_pool.py with two functions to fill in
    python -m minivllm.learn check 7         run the exercise's tests on it
    python -m minivllm.learn hint 7          one more hint each time
    python -m minivllm.learn diff 7          from yours to the reference, once it has passed
    python -m minivllm.learn reset 7         put your file aside and open this exercise anew

`MINIVLLM_MINE=$PWD/mine` makes everything else run on the same files: pytest, the server, a lesson. Owns the folder mine/, and
never overwrites in it what a learner wrote: a file is replaced whole (learn_files.py), and only with all of its text kept.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import importlib.util
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from minivllm import learn_check
from minivllm.blanks import (
    SourceError,
    blank,
    code_of,
    find,
    forgets_return,
    is_blank,
    is_untouched,
    lines_of,
    parse,
    splice,
)
from minivllm.exercises import EXERCISES, LESSONS, Exercise
from minivllm.learn_files import LearnError, Mark, Workshop

COMMAND = "python -m minivllm.learn"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Status 0: done, or passed; 1: not yet; 2: it could not be done, and a line says why."""
    parser = argparse.ArgumentParser(COMMAND, description="Exercises: fill in functions of minivllm, and its tests judge them.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("list", help="all exercises, and how far you are")
    for name, what in {"start": "write the file with the functions to fill in", "check": "run the exercise's tests on your file",
                       "hint": "one more hint each time", "diff": "from yours to the reference",
                       "reset": "put your file aside and open the exercise anew"}.items():
        command = commands.add_parser(name, help=what)
        command.add_argument("exercise", help="its number or name: 7, 1b, 07-block-pool")
        if name == "diff":
            command.add_argument("--anyway", action="store_true", help="show the reference before the exercise has passed")
        if name == "reset":
            command.add_argument("--keep", action="store_true", help="keep your functions of this exercise too, in today's module")
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        return run(arguments)
    except (LearnError, SourceError) as error:
        print(f"{error}", file=sys.stderr)
        return 2


def run(arguments: argparse.Namespace) -> int:
    workshop = Workshop.find()
    if arguments.command == "list":
        return show_list(workshop)
    exercise = named(arguments.exercise)
    if arguments.command == "start":
        return start(workshop, exercise)
    if arguments.command == "check":
        return check(workshop, exercise)
    if arguments.command == "hint":
        return hint(workshop, exercise)
    if arguments.command == "diff":
        return diff(workshop, exercise, arguments.anyway)
    return reset(workshop, exercise, arguments.keep)


def named(text: str) -> Exercise:
    """The exercise of this number ("7", "07", "1b") or name; of a lesson with several the error names them."""
    wanted = text.lower()
    found = [e for e in EXERCISES if wanted in (e.name, e.number, e.name.split("-")[0], e.name.split("-", 1)[1])]
    if found:
        return found[0]
    several = [e.name for e in EXERCISES if wanted.isdecimal() and e.lesson == int(wanted)]
    if several:
        raise LearnError(f"lesson {int(wanted)} has {len(several)} exercises, name one: {', '.join(several)}")
    raise LearnError(f"there is no exercise {text!r}: {COMMAND} list shows all of them")


def state_of(workshop: Workshop, exercise: Exercise) -> str:
    """ "-" before `start`, then "started"; "passed" as long as the functions are those that passed."""
    if exercise.name not in workshop.mark(exercise.module).started:
        return "-"
    answer = answer_of(workshop, exercise)
    return "passed" if answer is not None and answer == workshop.passed(exercise) else "started"


def answer_of(workshop: Workshop, exercise: Exercise) -> str | None:
    """A digest of the learner's functions, which comments and spaces do not change; None where there is nothing to digest."""
    try:
        mine = workshop.read(exercise.module)
        code = "\n".join(code_of(find(mine, name, exercise.module)) for name in exercise.blanks)
        return hashlib.sha256(code.encode()).hexdigest()
    except SourceError:
        return None


def show_list(workshop: Workshop) -> int:
    for lesson, title in LESSONS.items():
        print(f"{lesson:2}  {title}")
        for exercise in EXERCISES:
            if exercise.lesson == lesson:
                names = ", ".join(exercise.blanks)
                print(f"    {state_of(workshop, exercise):<8} {exercise.name:<18} {names}")
    return 0


def joined(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def open_blanks(workshop: Workshop, exercise: Exercise, source: str) -> tuple[str, list[str]]:
    """The text with the exercise's functions blank, and their names. What differs from the reference is a learner's, and stays."""
    where, reference, opened = workshop.shown(exercise.module), workshop.reference(exercise.module), []
    for name in exercise.blanks:
        node = find(source, name, where)
        if not is_blank(node) and code_of(node) == code_of(find(reference, name, exercise.module)):
            source = blank(source, name, where)
            opened.append(name)
    return source, opened


def start(workshop: Workshop, exercise: Exercise) -> int:
    """Open the exercise's functions in mine/: in a copy of the module, or in the learner's file if there is one."""
    workshop.need_tests()
    shown, is_new = workshop.shown(exercise.module), not workshop.path(exercise.module).exists()
    then, mark = f"{COMMAND} check {exercise.name}", Mark() if is_new else find_mark(workshop, exercise)
    if exercise.name in mark.started:
        print(f"{exercise.name} is started already, and {shown} is as you left it. Go on with: {then}")
        return 0
    if not is_new and workshop.has_aged(exercise.module):
        raise LearnError(f"minivllm/{exercise.module}.py has changed since {shown} was copied from it. First put your functions "
                         f"into today's: {COMMAND} reset {mark.started[0]} --keep")
    source = workshop.reference(exercise.module) if is_new else workshop.read(exercise.module)
    source, opened = open_blanks(workshop, exercise, source)
    workshop.write(exercise.module, source, (*mark.started, exercise.name))
    if is_new:
        print(f"Wrote {shown}. Fill in {joined(opened)}, then: {then}")
    elif opened:
        print(f"Opened {joined(opened)} in {shown}; the rest is as you left it. Fill in, then: {then}")
    else:
        print(f"{shown} has its own {joined(exercise.blanks)} already, and nothing was changed. Then: {then}")
    return 0


def find_mark(workshop: Workshop, exercise: Exercise) -> Mark:
    """The mark of a file that is there. One that was lost is written again, if nothing but functions of exercises has changed."""
    module, shown = exercise.module, workshop.shown(exercise.module)
    parse(workshop.read(module), shown)
    mark = workshop.mark(module)
    if not mark.fingerprint:
        mark = need_recovered(workshop, exercise)
        workshop.write(module, workshop.read(module), mark.started)
        print(f"{shown} had lost its last line, by which check knows it: the line is back.")
    return mark


def need_recovered(workshop: Workshop, exercise: Exercise) -> Mark:
    """The mark that a file has lost; a `LearnError` says what to do where it cannot be known."""
    mark, is_sure = workshop.lost_mark(exercise.module)
    if is_sure:
        return mark
    missing = f"{workshop.shown(exercise.module)} was not written by start, or has lost its last line."
    if not mark.started:
        raise LearnError(f"{missing} Move the file away, and start again.")
    raise LearnError(f"{missing} If it is your copy of today's minivllm/{exercise.module}.py, put this line back at its end, "
                     f"otherwise move the file away:\n{mark}")


def need_started(workshop: Workshop, exercise: Exercise) -> Mark:
    mark = workshop.mark(exercise.module)
    if not mark.fingerprint and workshop.path(exercise.module).exists():
        need_recovered(workshop, exercise)
        raise LearnError(f"{workshop.shown(exercise.module)} has lost its last line, by which {COMMAND} knows it. "
                         f"This puts it back: {COMMAND} start {exercise.name}")
    if exercise.name not in mark.started:
        raise LearnError(f"{exercise.name} is not started: {COMMAND} start {exercise.name}")
    return mark


def check(workshop: Workshop, exercise: Exercise) -> int:
    """Run the tests on a copy of the learner's module, in which the blanks of other exercises are filled in."""
    workshop.need_tests()
    need_started(workshop, exercise)
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        raise LearnError("the tests need pytest and hypothesis: pip install -e '.[dev]' in the clone")
    source, answer = workshop.read(exercise.module), answer_of(workshop, exercise)
    parse(source, workshop.shown(exercise.module))
    if workshop.has_aged(exercise.module):
        print(f"  note     minivllm/{exercise.module}.py has changed since you started: {COMMAND} reset {exercise.name} --keep "
              f"puts your functions into today's")
    if sys.stdout.isatty():
        print(f"  running  {len(exercise.tests)} tests, for {exercise.seconds} seconds at most")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{exercise.module}.py").write_text(alone(workshop, exercise, source), encoding="utf-8")
        story = learn_check.run_tests(exercise.tests, Path(folder), workshop.root, exercise.seconds)
    if not story.broken:
        workshop.note(exercise, "passed", answer)
        print(f"{exercise.name}: passed\n  next     {COMMAND} diff {exercise.name}")
        return 0
    silent = [name for name in exercise.blanks if forgets_return(find(source, name, workshop.shown(exercise.module)))]
    if silent and "None" in story.broken:
        story.broken = f"{silent[0]} returned None: it can end without a return ({story.broken})"
    for label, text in (("promise", story.promise), ("broken", story.broken), ("when", story.when)):
        if text:
            print(f"  {label:<8} {text}")
    print(f"{exercise.name}: not yet\n  next     {COMMAND} hint {exercise.name}")
    return 1


def alone(workshop: Workshop, exercise: Exercise, source: str) -> str:
    """The learner's module with the blanks of other exercises filled in: an exercise waits for no other one."""
    where, reference = workshop.shown(exercise.module), workshop.reference(exercise.module)
    for other in EXERCISES:
        if other.module == exercise.module and other != exercise and other.name in workshop.mark(exercise.module).started:
            for name in other.blanks:
                if is_blank(find(source, name, where)):
                    source = splice(source, name, reference, where, exercise.module)
    return source


def hint(workshop: Workshop, exercise: Exercise) -> int:
    """All hints shown before, and one more."""
    need_started(workshop, exercise)
    most = len(exercise.hints)
    count = workshop.count_hint(exercise, most)
    for number, text in enumerate(exercise.hints[:count], start=1):
        print(f"hint {number} of {most}: {text}")
    if count == most:
        print(f"(No more hints. The reference: {COMMAND} diff {exercise.name} --anyway)")
    return 0


def diff(workshop: Workshop, exercise: Exercise, anyway: bool) -> int:
    """From the learner's functions to the reference's, freely once they have passed."""
    need_started(workshop, exercise)
    if state_of(workshop, exercise) != "passed" and not anyway:
        print(f"{exercise.name} has not passed, and diff shows the reference. First: {COMMAND} check {exercise.name}\n"
              f"To see it all the same: {COMMAND} diff {exercise.name} --anyway")
        return 1
    mine, reference, shown = workshop.read(exercise.module), workshop.reference(exercise.module), workshop.shown(exercise.module)
    for name in exercise.blanks:
        yours = [line.rstrip("\r") for line in lines_of(mine, find(mine, name, shown))]
        theirs = lines_of(reference, find(reference, name, exercise.module))
        changes = list(difflib.unified_diff(yours, theirs, f"{shown}  {name}", f"minivllm/{exercise.module}.py", lineterm=""))
        print("\n".join(changes) if changes else f"{name} is the reference's, line for line.")
    return 0


def reset(workshop: Workshop, exercise: Exercise, keep: bool) -> int:
    """Put the file aside, and write today's module with the learner's other exercises in it, and with `keep` this one too."""
    mark, shown, where = need_started(workshop, exercise), workshop.shown(exercise.module), exercise.module
    mine, source, kept = workshop.read(exercise.module), workshop.reference(exercise.module), []
    parse(mine, shown)
    for other in (e for e in EXERCISES if e.name in mark.started and e.module == exercise.module):
        for name in other.blanks:
            if (other == exercise and not keep) or is_untouched(find(mine, name, shown)):
                source = blank(source, name, where)
            else:
                source = splice(source, name, mine, where, shown)
                kept.append(name)
    aside = workshop.put_aside(exercise.module)
    workshop.write(exercise.module, source, mark.started)
    if not keep:
        workshop.note(exercise, "hints", 0)
    stays = f", with your {joined(kept)}" if kept else ""
    print(f"Your file is {aside} now. Wrote {shown}{stays}, then: {COMMAND} check {exercise.name}")
    return 0


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an example may hold what the terminal cannot show
    sys.exit(main())
