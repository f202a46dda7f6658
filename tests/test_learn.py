"""The learner's commands: files are written whole or not at all, nobody's work is lost, and failures are told in three lines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fork_checks import Checker

import minivllm
from minivllm import learn, learn_check, learn_files
from minivllm.blanks import SourceError, blank, code_of, find, fingerprint, forgets_return, is_blank, lines_of, splice
from minivllm.exercises import EXERCISES, LESSONS
from minivllm.learn_check import Story
from minivllm.learn_files import LearnError, Workshop

ROOT = Path(__file__).parent.parent
REFERENCE = (ROOT / "minivllm" / "block_pool.py").read_text(encoding="utf-8")
OPEN = 'raise NotImplementedError("your turn: BlockPool.get_new_blocks, about 8 lines")'


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A clone's package and an empty mine/, both in a folder of the test; `check` tells a story at once."""
    package = tmp_path / "minivllm"
    package.mkdir()
    for path in (ROOT / "minivllm").glob("*.py"):
        (package / path.name).write_bytes(path.read_bytes())
    place = Workshop(ROOT, package, tmp_path / "mine")
    monkeypatch.setattr(Workshop, "find", classmethod(lambda cls: place))
    monkeypatch.setattr(learn_check, "run_tests", lambda *args: Story())
    monkeypatch.chdir(tmp_path)
    return place


@pytest.fixture
def run(capsys):
    """Run a command; its status and all it printed."""
    def one(*arguments):
        status = learn.main(arguments)
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return one


def text_of(workshop, module="block_pool"):
    return (workshop.mine / f"{module}.py").read_text(encoding="utf-8")


def solve(workshop, name="BlockPool.get_new_blocks", module="block_pool", line="        return [1]  # mine\n"):
    """Replace a blank by a line."""
    source = text_of(workshop, module)
    opened = re.search(rf' +raise NotImplementedError\("your turn: {re.escape(name)},[^\n]*\n', source)
    assert opened, f"{name} is not open in {source}"
    (workshop.mine / f"{module}.py").write_text(source.replace(opened[0], line), encoding="utf-8")


# Writing


@pytest.mark.parametrize("exercise", EXERCISES, ids=[exercise.name for exercise in EXERCISES])
def test_start_opens_the_functions_and_changes_nothing_else(exercise, workshop, run):
    """The file is the module with the exercise's bodies replaced by one line each, and one line more at its end."""
    assert run("start", exercise.name)[0] == 0, f"{exercise.name} did not start"
    mine, reference = text_of(workshop, exercise.module), workshop.reference(exercise.module)
    for name in exercise.blanks:
        assert is_blank(find(mine, name, "mine")), f"{name} is not blank"
        mine = splice(mine, name, reference, "mine", exercise.module)
    *lines, mark, end = mine.split("\n")
    assert "\n".join([*lines, end]) == reference, f"{exercise.name}: more than the blanks differs from the reference"
    assert mark.startswith(f"# minivllm.learn: {exercise.name} in a copy of "), f"the last line is {mark!r}"


def test_starting_twice_changes_nothing(workshop, run):
    """A file that is there stays as the learner left it, byte for byte, even where the answer is the reference's own."""
    run("start", "7")
    answers = REFERENCE[REFERENCE.index("        assert num_blocks <="):REFERENCE.index("    def touch")].removesuffix("\n\n")
    solve(workshop, line=answers + "\n")
    before = text_of(workshop)
    status, printed = run("start", "07-block-pool")
    assert (status, text_of(workshop)) == (0, before), f"the file changed: {printed}"
    assert "as you left it" in printed, f"it says {printed}"


def test_a_second_exercise_in_one_module_opens_its_own_functions_alone(workshop, run):
    """The first exercise's answers, and whatever else the learner wrote in the file, stay while the second is opened."""
    run("start", "7")
    solve(workshop)
    path = workshop.mine / "block_pool.py"
    path.write_text("# my notes\n" + text_of(workshop), encoding="utf-8")
    status, printed = run("start", "11c")
    mine = text_of(workshop)
    assert status == 0 and "BlockPool.touch and BlockPool.evict" in printed, f"it says {printed}"
    assert mine.startswith("# my notes\n") and "return [1]  # mine" in mine, "the learner's lines are gone"
    assert "your turn: BlockPool.free_blocks" in mine, "the open blank of the first exercise is gone"
    assert "your turn: BlockPool.touch" in mine and "your turn: BlockPool.evict" in mine, "the second exercise is not open"
    assert mine.rstrip().splitlines()[-1].startswith("# minivllm.learn: 07-block-pool, 11c-shared-blocks in"), mine[-200:]
    assert mine.count("# minivllm.learn:") == 1, "the old last line is still there"


def test_a_function_that_the_learner_has_changed_is_not_opened(workshop, run):
    """What differs from the reference is work, whoever asked for it."""
    run("start", "7")
    path = workshop.mine / "block_pool.py"
    path.write_text(text_of(workshop).replace("            self.ref_counts[block_id] += 1", "            pass  # an idea"),
                    encoding="utf-8")
    status, printed = run("start", "11c")
    assert status == 0 and "pass  # an idea" in text_of(workshop), f"the idea is gone: {printed}"
    assert "Opened BlockPool.evict in" in printed, f"it says {printed}"


@pytest.mark.parametrize("command", [("start", "11c"), ("start", "7"), ("check", "7"), ("reset", "7"), ("diff", "7", "--anyway")])
def test_a_file_that_is_no_python_is_refused_with_its_line_and_stays(command, workshop, run):
    """The line that Python does not understand is named, and nothing is written."""
    run("start", "7")
    path = workshop.mine / "block_pool.py"
    path.write_text(text_of(workshop).replace("    def touch(", "    def touch(("), encoding="utf-8")
    before, line = path.read_bytes(), 1 + text_of(workshop)[:text_of(workshop).index("touch((")].count("\n")
    status, printed = run(*command)
    assert status == 2 and f"block_pool.py, line {line}:" in printed, f"status {status}: {printed}"
    assert path.read_bytes() == before and len(list(workshop.mine.glob("*.py"))) == 1, "a file has changed"


def test_a_file_that_start_did_not_write_is_refused(workshop, run):
    """Somebody's own file of the same name is nobody else's business."""
    workshop.mine.mkdir()
    (workshop.mine / "block_pool.py").write_text("mine = 1\n", encoding="utf-8")
    status, printed = run("start", "7")
    assert (status, text_of(workshop)) == (2, "mine = 1\n"), f"it was touched: {printed}"
    assert "Move the file away" in printed, f"it says {printed}"


def without_mark(workshop):
    """The learner's file, less its last line."""
    mine, mark = text_of(workshop).rstrip("\n").rsplit("\n", 1)
    (workshop.mine / "block_pool.py").write_text(mine + "\n", encoding="utf-8")
    return mark


def test_a_last_line_that_was_lost_is_put_back_by_start(workshop, run):
    """Check, diff, hint and reset say that start puts it back, and start does: the same line, and nothing else."""
    run("start", "7")
    solve(workshop)
    before, _ = text_of(workshop), without_mark(workshop)
    for command in (("check", "7"), ("diff", "7"), ("hint", "7"), ("reset", "7")):
        status, printed = run(*command)
        assert status == 2 and "This puts it back: python -m minivllm.learn start 07-block-pool" in printed, f"{command}: {printed}"
    status, printed = run("start", "7")
    assert (status, text_of(workshop)) == (0, before), f"the file is another one: {printed}"
    assert "the line is back" in printed, f"it says {printed}"


def test_a_last_line_that_cannot_be_known_is_shown(workshop, run):
    """In a file with changes of its own the line is a guess: it is printed, and nothing is written."""
    run("start", "7")
    mark = without_mark(workshop)
    path = workshop.mine / "block_pool.py"
    path.write_text(text_of(workshop) + "\n\ndef helper(block_id):\n    return block_id\n", encoding="utf-8")
    before = text_of(workshop)
    for command in ("start", "check"):
        status, printed = run(command, "7")
        assert (status, text_of(workshop)) == (2, before), f"{command} has changed the file: {printed}"
        assert mark in printed, f"{command} does not show the line {mark!r}, but {printed}"


def test_an_interrupted_write_leaves_the_old_file(workshop, run, monkeypatch):
    """If the last step of a write fails, the file is as before and nothing else lies in the folder."""
    run("start", "7")
    before = text_of(workshop)

    def fail(*paths):
        raise OSError("the disk is full")

    monkeypatch.setattr(learn_files.os, "replace", fail)
    with pytest.raises(OSError, match="disk is full"):
        run("start", "11c")
    assert text_of(workshop) == before, "the file has changed"
    assert [path.name for path in workshop.mine.iterdir()] == ["block_pool.py"], f"{list(workshop.mine.iterdir())}"


def test_line_ends_of_another_system_stay(workshop, run):
    """A file with carriage returns keeps them, and the new lines get them."""
    run("start", "7")
    path = workshop.mine / "block_pool.py"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    run("start", "11c")
    content = path.read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n"), "some lines end in a line feed alone"
    assert b"your turn: BlockPool.evict" in content, "the second exercise is not open"


# Reset, and a reference that moves on


def test_reset_keeps_the_old_file_and_the_other_exercises_answers(workshop, run):
    """The old file is there under a new name, the exercise is open again, and the functions of the other one are kept."""
    run("start", "7")
    solve(workshop)
    run("start", "11c")
    solve(workshop, "BlockPool.touch", line="        self.touched = block_ids  # mine too\n")
    for number in (1, 2):
        before = text_of(workshop)
        status, printed = run("reset", "7")
        aside = (workshop.mine / f"block_pool.{number}.py").read_text(encoding="utf-8")
        assert (status, aside) == (0, before), f"block_pool.{number}.py is not the old file: {printed}"
        assert OPEN in text_of(workshop), "the exercise is not open again"
        assert "# mine too" in text_of(workshop), "the other exercise's answer is gone"
        assert "your turn: BlockPool.evict" in text_of(workshop), "the other exercise's blank is gone"
        solve(workshop)


def test_reset_keeps_what_is_half_written(workshop, run):
    """First lines above an open blank of another exercise are work too."""
    run("start", "7")
    run("start", "11c")
    path = workshop.mine / "block_pool.py"
    opened = '        raise NotImplementedError("your turn: BlockPool.touch'
    half = f"        owners = 1  # half written\n{opened}"
    path.write_text(text_of(workshop).replace(opened, half), encoding="utf-8")
    status, printed = run("reset", "7")
    assert status == 0 and half in text_of(workshop), f"the half-written function is gone: {printed}"


def test_a_reference_that_has_changed_is_noticed_and_reset_brings_it_in(workshop, run):
    """Check says so, start waits, and reset --keep puts the learner's functions into today's module."""
    run("start", "7")
    solve(workshop)
    path = workshop.package / "block_pool.py"
    old, new = "        return len(self.free_queue)\n", "        return sum(1 for _ in self.free_queue)\n"
    path.write_text(REFERENCE.replace(old, new), encoding="utf-8")
    assert "has changed since you started" in run("check", "7")[1], "check says nothing"
    status, printed = run("start", "11c")
    assert status == 2 and "reset 07-block-pool --keep" in printed, f"status {status}: {printed}"
    status, printed = run("reset", "7", "--keep")
    assert status == 0 and new in text_of(workshop) and "# mine" in text_of(workshop), f"{printed}{text_of(workshop)}"
    assert "has changed" not in run("check", "7")[1], "check still says so"
    assert run("start", "11c")[0] == 0, "start still waits"


def test_comments_docstrings_and_the_answers_do_not_make_a_reference_new():
    """The digits at the end of a file change with the code around the answers, and with nothing else."""
    names = ["BlockPool.get_new_blocks"]
    before = fingerprint(REFERENCE, names, "reference")
    same = [REFERENCE.replace("        return len(self.free_queue)\n", "        # a word\n        return len(self.free_queue)\n"),
            REFERENCE.replace("Take this many blocks", "Take so many blocks"), blank(REFERENCE, names[0], "reference")]
    assert {fingerprint(text, names, "reference") for text in same} == {before}, "a comment, a docstring or the answer counts"
    assert fingerprint(REFERENCE, [], "reference") != before, "the answer counts where it is no exercise"


# Names, hints, diff, list


@pytest.mark.parametrize(("text", "name"), [("7", "07-block-pool"), ("07", "07-block-pool"), ("block-pool", "07-block-pool"),
                                            ("1b", "01b-attention"), ("01B", "01b-attention"), ("0", "00-greedy")])
def test_an_exercise_is_named_as_one_likes(text, name):
    """Number, number with its zero, name, or both."""
    assert learn.named(text).name == name, f"{text} is {learn.named(text).name}"


def test_what_is_not_an_exercise_is_explained(workshop, run):
    """A lesson with several exercises names them, and what does not exist points to the list."""
    assert run("start", "1") == (2, "lesson 1 has 3 exercises, name one: 01a-rope, 01b-attention, 01c-decoder-layer\n")
    assert run("check", "99") == (2, "there is no exercise '99': python -m minivllm.learn list shows all of them\n")
    assert run("check", "7") == (2, "07-block-pool is not started: python -m minivllm.learn start 07-block-pool\n")


def test_without_a_command_there_is_help(workshop, run):
    """Who types no command is shown all of them, and that is no error."""
    status, printed = run()
    assert status == 0 and all(command in printed for command in ("list", "start", "check", "hint", "diff", "reset")), printed


def test_every_name_is_a_file_name_on_every_system():
    """Letters, digits and hyphens in lower case, and none of the names that Windows keeps for devices."""
    for exercise in EXERCISES:
        assert re.fullmatch(r"\d\d[a-z]?(-[a-z0-9]+)+", exercise.name), f"{exercise.name!r} is not a plain name"
        assert exercise.module not in ("con", "aux", "nul", "prn"), f"{exercise.module}.py is a device on Windows"


def test_hints_come_one_at_a_time(workshop, run):
    """Each call shows one hint more than the last, numbered, and behind the last one the way out; a reset begins anew."""
    hints = learn.named("7").hints
    assert run("hint", "7") == (2, "07-block-pool is not started: python -m minivllm.learn start 07-block-pool\n")
    run("start", "7")
    for count in range(1, len(hints) + 2):
        printed = run("hint", "7")[1]
        shown = [hint for hint in hints if hint in printed]
        assert shown == list(hints[:count]), f"call {count} shows {len(shown)} hints"
    assert "diff 07-block-pool --anyway" in printed, f"the last call says {printed}"
    assert (workshop.mine / "learn.json").read_bytes().endswith(b"}\n"), "learn.json ends within a line"
    run("reset", "7")
    assert run("hint", "7")[1] == f"hint 1 of {len(hints)}: {hints[0]}\n", "after a reset hints do not begin with the first"


def test_diff_waits_until_the_exercise_has_passed(workshop, run):
    """Before that it shows nothing of the reference, unless asked for anyway; afterwards only the exercise's functions."""
    run("start", "7")
    status, printed = run("diff", "7")
    assert status == 1 and "popitem" not in printed, f"it shows {printed}"
    assert "+            block_id, _ = self.free_queue.popitem(last=False)" in run("diff", "7", "--anyway")[1], "no reference"
    solve(workshop)
    assert run("check", "7") == (0, "07-block-pool: passed\n  next     python -m minivllm.learn diff 07-block-pool\n")
    status, printed = run("diff", "7")
    assert status == 0 and "-        return [1]  # mine" in printed and "def touch" not in printed, f"it shows {printed}"


def test_a_forgotten_return_is_told_with_its_function(workshop, run, monkeypatch):
    """A function that should return something, and has no line that does, is named instead of what None led to."""
    run("start", "7")
    solve(workshop, line="        self.free_queue.popitem()\n")
    said = "TypeError: object of type 'NoneType' has no len()"
    monkeypatch.setattr(learn_check, "run_tests", lambda *args: Story("", said, ""))
    printed = run("check", "7")[1]
    assert f"broken   BlockPool.get_new_blocks returned None: it can end without a return ({said})" in printed, printed


def test_at_a_terminal_a_check_says_that_it_has_begun(workshop, run, monkeypatch):
    """Tests with a model are silent for seconds, so the first line comes before them; a file or a pipe does without."""
    run("start", "7")
    assert "running" not in run("check", "7")[1], "the line is there although nobody waits"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    printed = run("check", "7")[1]
    assert printed.startswith("  running  8 tests, for 15 seconds at most\n"), f"it says {printed}"


def test_the_list_knows_how_far_one_is(workshop, run):
    """An exercise is untouched, started, or passed; one that is changed after it passed is started again."""
    def states():
        return re.findall(r"(\S+) +07-block-pool", run("list")[1])

    seen = states()
    run("start", "7")
    seen += states()
    solve(workshop)
    run("check", "7")
    seen += states()
    (workshop.mine / "block_pool.py").write_text(text_of(workshop).replace("return [1]  # mine", "return [2]"), encoding="utf-8")
    seen += states()
    assert seen == ["-", "started", "passed", "started"], f"the states are {seen}"
    printed = run("list")[1]
    assert all(title in printed for title in LESSONS.values()), "a lesson is missing"
    assert printed.count("\n") == len(LESSONS) + len(EXERCISES), f"{printed}"


def test_without_the_clone_s_tests_it_says_how_to_get_them(tmp_path):
    """An installed wheel has no tests: the message says that, and the way."""
    with pytest.raises(LearnError, match=r"(?s)come with a clone.*pip install -e '\.\[dev\]'"):
        Workshop(tmp_path, tmp_path / "minivllm", tmp_path / "mine").need_tests()


# Checking for real


def overlay_of(tmp_path, old="", new=""):
    """A folder whose block_pool.py is the reference with one edit."""
    assert old in REFERENCE, f"{old!r} is not in block_pool.py"
    (tmp_path / "block_pool.py").write_text(REFERENCE.replace(old, new, 1), encoding="utf-8")
    return tmp_path


POOL_TESTS = ("tests/test_block_pool.py::test_asking_for_more_than_is_free_is_our_mistake_and_says_so",
              "tests/test_block_pool.py::test_blocks_are_taken_from_the_left", "tests/test_block_pool.py::test_check_finds_damage")
STORIES = {
    "an error is told with the line it came from": (
        "popitem(last=False)", "popleft()",
        "AttributeError: 'collections.OrderedDict' object has no attribute 'popleft' "
        "(in get_new_blocks: block_id, _ = self.free_queue.popleft())"),
    "a module that cannot be imported says why": (
        "class BlockPool:", "class BlockPool(Pool):",
        "NameError: name 'Pool' is not defined (in <module>: class BlockPool(Pool):)"),
    "a refusal that is missing is told with its call": (
        '        assert num_blocks <= len(self.free_queue), f"{num_blocks} blocks wanted, {len(self.free_queue)} free"\n',
        "        num_blocks = min(num_blocks, len(self.free_queue))\n",
        "get_new_blocks(3) with 2 blocks free has to stop with an assert, and nothing was raised"),
    "a refusal without a message is one too": (
        ', f"{num_blocks} blocks wanted, {len(self.free_queue)} free"', "",
        "get_new_blocks(3) with 2 blocks free stops with an assert that has no message"),
    "a refusal may have its words in any order": (
        'f"{num_blocks} blocks wanted, {len(self.free_queue)} free"', 'f"{len(self.free_queue)} free, wanted: {num_blocks}"', ""),
    "what a refusal leaves out is named": (
        'f"{num_blocks} blocks wanted, {len(self.free_queue)} free"', '"too many"',
        "get_new_blocks(3) with 2 blocks free stops with an assert whose message is 'too many' and does not name 3 and 2"),
    "a sentence has its numbers": (
        "popitem(last=False)", "popitem()",
        "of a free queue 1, 2, 3, 4 two requests for 2 blocks take [[4, 3], [2, 1]] instead of [[1, 2], [3, 4]]"),
    "the tests pass": ("", "", ""),
}


@pytest.mark.parametrize("case", STORIES)
def test_a_failure_is_told_in_the_learners_terms(case, tmp_path):
    """Whatever goes wrong in the learner's file, the story names it: a sentence, or an error and its line."""
    old, new, broken = STORIES[case]
    story = learn_check.run_tests(POOL_TESTS, overlay_of(tmp_path, old, new), ROOT)
    assert story.broken == broken, f"{case}: {story}"


def test_a_loop_without_end_is_ended_and_told_with_its_promise(tmp_path):
    """After the time limit the process is ended, and the test in which it hung is named."""
    overlay = overlay_of(tmp_path, "        block_ids = []\n", "        while True: pass\n")
    line = 1 + REFERENCE[:REFERENCE.index("        block_ids = []\n")].count("\n")
    story = learn_check.run_tests(POOL_TESTS, overlay, ROOT, time_limit=6)
    assert story == Story("New blocks are those at the left of the free queue, the leftmost first.",
                          f"no result after 6 seconds: it hangs in get_new_blocks, line {line}: while True: pass"), f"{story}"


RANDOM_TEST = ("tests/test_block_pool.py::test_every_block_is_free_or_owned",)
PLAYED = {
    "an owner is forgotten": (
        "            if self.ref_counts[block_id] == 0:\n                self.free_queue",
        "            if True:\n                self.free_queue",
        "free blocks: 1, held blocks: 1, and the pool has 1",
        "BlockPool(2); get_new_blocks(1) -> [1]; touch([1]); free_blocks([1])"),
    "a hash is kept too long": (
        "            self.evict(block_id)\n", "", "a hit on 'content 0' finds block 1, which holds what its new owner writes",
        "BlockPool(2); get_new_blocks(1) -> [1]; cache_block(1, 'content 0'); free_blocks([1]); get_new_blocks(1) -> [1]; "
        "get_cached_block('content 0') -> 1"),
}


@pytest.mark.parametrize("case", PLAYED)
def test_a_random_play_is_told_as_the_calls_that_were_made(case, tmp_path):
    """The example of the random test is a list of calls on the pool, each with its answer, and as short as can be."""
    old, new, broken, when = PLAYED[case]
    story = learn_check.run_tests(RANDOM_TEST, overlay_of(tmp_path, old, new), ROOT)
    assert (story.broken, story.when) == (broken, when), f"{case}: {story}"


def test_blanks_of_other_exercises_do_not_get_in_the_way(workshop, run, monkeypatch):
    """A check fills in what other exercises have left open, so that only its own functions can fail."""
    run("start", "7")
    run("start", "11c")
    seen = []
    monkeypatch.setattr(learn_check, "run_tests", lambda tests, folder, *rest: seen.append(
        Path(folder, "block_pool.py").read_text(encoding="utf-8")) or Story())
    run("check", "11c")
    assert "your turn: BlockPool.touch" in seen[0] and "your turn: BlockPool.evict" in seen[0], "its own blanks were filled in"
    assert "your turn: BlockPool.get_new_blocks" not in seen[0], "another exercise's blank was left open"


# The overlay


def python(code, cwd, mine):
    return subprocess.run([sys.executable, *code], cwd=cwd, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"MINIVLLM_MINE": str(mine), "PYTHONPATH": str(ROOT)})


def test_a_relative_overlay_is_made_absolute(tmp_path):
    """A folder named from where one stands is the same folder for processes that start elsewhere."""
    (tmp_path / "mine").mkdir()
    done = python(["-c", "import minivllm, os; print(os.environ['MINIVLLM_MINE']); print(minivllm.__path__[0])"], tmp_path, "mine")
    assert [Path(line).resolve() for line in done.stdout.split()] == [(tmp_path / "mine").resolve()] * 2, f"{done}"


def test_an_overlay_that_does_not_exist_is_refused(tmp_path):
    """A mistyped folder is an error with a way out, and not the reference without a word."""
    done = python(["-c", "import minivllm"], tmp_path, "mime")
    assert done.returncode == 1 and "mime' and there is no such folder: make it, or unset" in done.stderr, done.stderr[-300:]


def test_the_server_runs_on_the_overlay(tmp_path):
    """What the server imports is the learner's module."""
    code = "import sys, minivllm.serve.server, minivllm.llm; print(sys.modules['minivllm.block_pool'].__file__)"
    done = python(["-c", code], ROOT, overlay_of(tmp_path))
    assert Path(done.stdout.strip()) == tmp_path / "block_pool.py", f"it runs on {done.stdout}{done.stderr[-300:]}"


def test_pytest_runs_on_the_overlay(tmp_path):
    """A mistake in the learner's file fails the ordinary test suite."""
    overlay = overlay_of(tmp_path, "popitem(last=False)", "popitem()")
    done = python(["-m", "pytest", "-q", "-p", "no:cacheprovider", POOL_TESTS[1]], ROOT, overlay)
    assert done.returncode == 1 and "two requests for 2 blocks take" in done.stdout, done.stdout[-300:]


def test_a_right_answer_in_other_words_keeps_the_tests_green(tmp_path):
    """A test that plants a mistake in the words of the reference is skipped, with a reason, where a learner's file is used."""
    overlay_of(tmp_path, "self.evict(block_id)\n", "BlockPool.evict(self, block_id)\n")
    test = "tests/test_shadow_kv.py::test_the_harness_catches[a block keeps its hash when it is handed out]"
    done = python(["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", test], ROOT, tmp_path)
    assert "1 skipped" in done.stdout and "BlockPool.get_new_blocks stands in a learner's file" in done.stdout, done.stdout[-300:]


def test_a_flat_package_is_what_an_overlay_can_shadow():
    """Modules of exercises lie in the package itself: a folder within it would not be found in the overlay."""
    for exercise in EXERCISES:
        assert (Path(minivllm.__path__[-1]) / f"{exercise.module}.py").is_file(), f"{exercise.module}.py is not in the package"


# Cutting and putting in


def test_what_cannot_be_cut_is_refused():
    """A function that is not there, or a text that is no Python, is an error that names the place."""
    cases = ("x = 1\n", "f", "a has no f"), ("class A: pass\n", "A.f", "a has no A.f"), ("def f(:\n", "f", "a, line 1")
    for source, name, sentence in cases:
        with pytest.raises(SourceError, match=sentence):
            find(source, name, "a")


@pytest.mark.parametrize(("signature", "body", "forgets"), [
    ("-> int", "x = 1", True), ("-> int", "return 1", False), ("-> None", "x = 1", False), ("", "x = 1", False),
    ("-> int", "if x:\n  return 1", True), ("-> int", "if x:\n  return 1\n else:\n  raise ValueError", False),
    ("-> int", "for x in y:\n  return 1", True), ("-> int", "while True:\n  return 1", False),
    ("-> int | None", "if x:\n  return 1", False), ("-> int | None", "x = 1", True), ("-> int", "yield 1", False)])
def test_a_function_that_can_end_without_its_value_is_known(signature, body, forgets):
    """A value is promised and one way through the function ends without a return: that is seen without running it."""
    source = f"def f(x, y) {signature}:\n {body}\n"
    assert forgets_return(find(source, "f", "a")) == forgets, f"{source} is judged to forget its return: {not forgets}"


def test_no_function_of_an_exercise_forgets_its_return():
    """The reference is never blamed for a return that is not missing."""
    for exercise in EXERCISES:
        source = (ROOT / "minivllm" / f"{exercise.module}.py").read_text(encoding="utf-8")
        blamed = [name for name in exercise.blanks if forgets_return(find(source, name, exercise.module))]
        assert not blamed, f"{blamed} would be told that a return is missing"


def test_a_cut_leaves_comments_and_neighbors_alone():
    """Decorators, signature and docstring stay; the body with its comments goes, and nothing behind it."""
    source = ('class A:\n    @property\n    def f(self):\n        """Doc."""\n'
              '        # secret\n        x = 1\n\n        return x\n\n    b = 2  # kept\n')
    result = blank(source, "A.f", "a")
    assert result == source.replace("        # secret\n        x = 1\n\n        return x\n",
                                    '        raise NotImplementedError("your turn: A.f, about 2 lines")\n'), result
    assert code_of(find(splice(result, "A.f", source, "a", "b"), "A.f", "a")) == "x = 1\nreturn x", "it does not come back"


# The page


def table() -> list[str]:
    """docs/exercises.md's table, from the exercises."""
    rows = ["| exercise | lesson | functions | module |", "|---|---|---|---|"]
    for exercise in EXERCISES:
        blanks = ", ".join(f"`{name}`" for name in exercise.blanks)
        rows.append(f"| `{exercise.name}` | {exercise.lesson}. {LESSONS[exercise.lesson]} | {blanks} | `{exercise.module}.py` |")
    return rows


def test_the_table_of_the_page_is_made_from_the_exercises():
    """The page lists the exercises that there are."""
    page = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
    assert "\n".join(table()) in page, "docs/exercises.md has another table; today's is:\n" + "\n".join(table())


def answer(workshop, name, block, module="generate"):
    """Write the body that a block of the page has, behind the docstring, as a learner would."""
    mine = text_of(workshop, module)
    lines, node = mine.split("\n"), find(mine, name, "mine")
    body = lines_of(block, find(block, name, "the page"))[1:]
    changed = "\n".join([*lines[:node.body[0].end_lineno], *body, *lines[node.end_lineno:]])
    (workshop.mine / f"{module}.py").write_text(changed, encoding="utf-8")


def test_the_transcript_of_the_page_is_what_is_printed(workshop, run, monkeypatch):
    """Every command of the page, run in order, with the answers that the page shows in between, prints what the page prints."""
    checker = Checker()  # runs the tests for real, and imports torch and transformers once instead of at each check
    monkeypatch.setattr(learn_check, "run_tests", lambda tests, overlay, *rest: checker.run(
        "generate", [Path(overlay, "generate.py").read_text(encoding="utf-8")], tests)[0])
    page = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
    for kind, block in re.findall(r"^```(console|python)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        if kind == "python":
            for name in re.findall(r"^def (\w+)", block, re.MULTILINE):
                answer(workshop, name, block)
            continue
        runs = re.findall(r"^\$ python -m minivllm\.learn ([^\n]*)\n(.*?)(?=^\$|\Z)", block, re.MULTILINE | re.DOTALL)
        for command, expected in runs:
            printed = run(*command.split())[1]
            lines = [line for line in expected.splitlines() if line.strip() not in ("", "...")]
            missing = [line for line in lines if line not in printed.splitlines()]
            assert lines and not missing, f"learn {command} does not print {missing}, but:\n{printed}"
    checker.close()


def test_readme_counts_the_exercises():
    """README says how many exercises and lessons there are."""
    sentence = f"{len(EXERCISES)} exercises over {len(LESSONS)} lessons"
    assert sentence in (ROOT / "README.md").read_text(encoding="utf-8"), f"README.md does not say {sentence!r}"
