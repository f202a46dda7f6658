"""The lessons are programs: what they show was run, and what they claim is asserted. `lessons/build.py --check` runs them."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from minivllm import viz, viz_bands
from minivllm.bench.workload import BenchRequest
from minivllm.course_clients import leave_at_random, read_every, serve_clients
from minivllm.course_launches import DecodeStep, launches, recorded
from minivllm.coursework import course_workload, guesses, run_engine, seat_rows, taught_workload
from minivllm.exercises import EXERCISES
from minivllm.tiny import draft_path

ROOT = Path(__file__).parent.parent
LESSONS = sorted((ROOT / "lessons").glob("[0-9][0-9]_*.py"))
PARTS = ["# Lesson ", "> **The one idea.**", "## What it costs", "## Your turn", "## Questions", "## In vLLM"]
LARGEST_NOTEBOOK = 150_000
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def load_build():
    spec = importlib.util.spec_from_file_location("lessons_build", ROOT / "lessons" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_there_are_lessons():
    """Fifteen, numbered from 0: the tests below would pass without any."""
    assert [int(path.name[:2]) for path in LESSONS] == list(range(15)), f"{[path.name for path in LESSONS]}"


def test_text_that_comes_in_pieces_is_one_output():
    """A busy machine's kernel sends `a`, then its line end: one output, as on a quiet one. A picture between keeps its place."""
    pytest.importorskip("nbconvert")
    from nbformat.v4 import new_output

    def text(words: str, name: str = "stdout"):
        return new_output("stream", name=name, text=words)

    picture = new_output("display_data", data={"text/plain": "picture"})
    outputs = load_build().joined([text("a"), text("\n"), text("b\n"), picture, text("c"), text("d", "stderr"), text("\n")])
    assert [output.get("text", "picture") for output in outputs] == ["a\nb\n", "picture", "c", "d", "\n"]
    assert load_build().joined([]) == []


def test_a_lesson_is_cut_into_cells():
    """Prose and code alternate as they are marked, and empty cells are left out."""
    pytest.importorskip("nbconvert")
    build = load_build()
    cells = build.parse("# %% [markdown]\n# # Title\n#\n# text\n\n# %%\nx = 1  # one\n\n\n# %%\n\n# %% [markdown]\n# end\n")
    assert cells == [("markdown", "# Title\n\ntext"), ("code", "x = 1  # one"), ("markdown", "end")]


@pytest.mark.parametrize("source", ["x = 1\n# %%\n", "# %% [markdown]\nx = 1\n"])
def test_code_never_disappears_into_prose(source):
    """Code before the first cell, or code in a cell of prose, is an error."""
    pytest.importorskip("nbconvert")
    with pytest.raises(ValueError, match="x = 1"):
        load_build().parse(source)


def test_a_notebook_without_outputs_is_the_same_twice():
    """Ids, order of fields and metadata depend on the source alone."""
    pytest.importorskip("nbconvert")
    build, source = load_build(), LESSONS[0].read_text(encoding="utf-8")
    assert json.dumps(build.to_notebook(source)) == json.dumps(build.to_notebook(source))


def test_a_notebook_sees_what_is_saved_beside_it():
    """The first code cell of a notebook, and no other, reloads modules that have changed; source and page do not say so."""
    pytest.importorskip("nbconvert")
    build, source = load_build(), LESSONS[0].read_text(encoding="utf-8")
    cells = [cell.source for cell in build.to_notebook(source).cells if cell.cell_type == "code"]
    assert [number for number, text in enumerate(cells) if "%autoreload 2" in text] == [0]
    shown = (ROOT / "docs" / "lessons" / f"{LESSONS[0].stem}.md").read_text(encoding="utf-8")
    assert "autoreload" not in source + shown, "plain Python cannot run it, and a page has nothing to reload"


@each_lesson
def test_the_notebook_was_made_from_this_source(path):
    """Whoever edits a lesson builds it: the notebook carries the hash of its source."""
    pytest.importorskip("nbconvert")
    notebook = json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))
    expected = load_build().source_hash(path.read_text(encoding="utf-8"))
    assert notebook["metadata"]["minivllm"]["source_sha256"] == expected, (
        f"stale: {path.stem}.ipynb. Run python lessons/build.py {path.name[:2]} and commit.")
    assert (ROOT / "docs" / "lessons" / f"{path.stem}.md").is_file()


@each_lesson
def test_a_notebook_is_small_and_whole(path):
    """Under 150 kB, every code cell executed, no error, and nothing about the machine or the hour."""
    text = path.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert len(text) < LARGEST_NOTEBOOK, f"{path.stem}.ipynb has {len(text):,} bytes"
    cells = json.loads(text)["cells"]
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code"), "a cell was not run"
    kinds = {output["output_type"] for cell in cells for output in cell.get("outputs", ())}
    assert kinds <= {"stream", "execute_result", "display_data"}, f"outputs of kind {kinds}"
    assert not re.search(r"/work/|/home/|/tmp/|iopub|0x[0-9a-f]{8}", text), "a path, a time or an address is in an output"


@each_lesson
def test_the_headline_number_is_an_assert(path):
    """In the last half of the lesson an assert compares a count with a number that is written out."""
    source = code_of(path)
    half = source.body[-1].end_lineno // 2
    claims = [node for node in ast.walk(source) if isinstance(node, ast.Assert) and node.lineno > half
              and any(isinstance(part, ast.Constant) and isinstance(part.value, int | float) for part in ast.walk(node.test))]
    assert claims, f"{path.name} asserts no number near its end"


@each_lesson
def test_a_lesson_has_all_parts_in_order(path):
    """Title, idea, price, exercise, questions, and where it lives in vLLM; the exercise has the lesson's number."""
    source = path.read_text(encoding="utf-8")
    places = [source.find(part) for part in PARTS]
    assert min(places) >= 0 and places == sorted(places), dict(zip(PARTS, places))
    assert f"# # Lesson {int(path.name[:2])}. " in source
    starts = re.findall(r"minivllm\.learn start (\d+)[a-d]?\b", source)
    assert starts and set(starts) == {str(int(path.name[:2]))}, f"exercises {starts}"
    assert len(re.findall(r"(?m)^# \d\. ", source)) >= 3, "three questions"


@each_lesson
def test_a_lesson_says_before_it_shows_an_answer(path):
    """Before a function of an exercise is shown the reader is told how to write it first."""
    source, number = path.read_text(encoding="utf-8"), int(path.name[:2])
    for exercise in (one for one in EXERCISES if one.lesson == number):
        shown = [source.find(f"show({owner}{name})") for blank in exercise.blanks for name in (blank, blank.split(".")[0])
                 for owner in ("", f"{exercise.module}.")]
        told = re.search(rf"write (?:it|them) before.*`python -m minivllm\.learn start .*\b{exercise.number}\b", source)
        for place in (place for place in shown if place >= 0):
            assert told and told.start() < place, f"{source[place:place + 40]!r} answers {exercise.name}, and comes unannounced"


@each_lesson
def test_a_lesson_imports_and_does_not_reimplement(path):
    """A cell has at most 15 lines of code: what is longer belongs into the package."""
    pytest.importorskip("nbconvert")
    cells = [text for kind, text in load_build().parse(path.read_text(encoding="utf-8"))
             if kind == "code" and not text.startswith(("from ", "import "))]
    longest = max(cells, key=lambda text: text.count("\n"))
    assert longest.count("\n") < 15, f"{path.name} has a cell of {longest.count(chr(10)) + 1} lines:\n{longest}"


# ---- Pictures and the workload ----


@pytest.fixture(scope="module")
def run():
    """Six requests in a pool of 32 blocks."""
    return run_engine(course_workload(6), num_blocks=33, block_size=16, max_model_len=512, enable_prefix_caching=False)


def test_pictures_are_valid_and_carry_their_numbers(run):
    """Every picture is well-formed XML without a background, and says its numbers as text."""
    state = run.states[2]
    owner, blocks = next((name, request["blocks"]) for name, request in state.requests.items())
    pictures = {
        viz.blocks([state], 33, "grid"): f">{owner}<", viz.blocks(run.states[1:41:8], 33, "film"): "<animate",
        viz.table(blocks, 20, 16, 33, "table"): f">{blocks[0]}<", viz.triangle([[0, 1], [0, 1, 2]], "triangle"): ">2<",
        viz.timeline([("row", [(0, 90, 3, "abc"), (90, 100, None, "")])], "step", "rows & lines"): ">abc<",
        viz.steps(run.work()[:9], ["a", "b", "c"], 2048, "steps"): "2048", viz.bars([("a", 1234), ("b", 0.5)], "bars"): "1,234",
        viz.line({"a": [(0, 1), (4, 32_640)]}, "x", "y", "line"): "32,640",
        viz_bands.ribbons([("request 0", [(0, 1, 0), (3, 1, 1)])], "step", "ribbons"): ">3<",
        viz_bands.stacks([("1", [120.0, 7.5])], ["a", "a name that needs a line of its own " * 3], "us", "sum"): "128"}
    for picture, expected in pictures.items():
        ElementTree.fromstring(picture)
        assert expected in picture, f"{expected!r} is not in the picture {picture[-80:]}"
        assert picture._repr_svg_() == picture


def test_a_shown_function_is_the_package_as_it_is():
    """`show` gives today's source, from its first column on."""
    shown = viz.show(viz.Svg._repr_svg_)
    assert shown.startswith("def _repr_svg_(self) -> str:\n    return") and repr(shown) == shown


def test_the_workload_is_the_same_everywhere():
    """64 requests, 4,766 prompt tokens, 3,334 new ones; a shorter one is its beginning."""
    workload = course_workload()
    assert (len(workload.requests), workload.num_prompt_tokens, workload.num_output_tokens) == (64, 4766, 3334)
    assert max(request.max_tokens for request in workload.requests) == 256
    assert course_workload(6).requests == workload.requests[:6]
    assert course_workload(16, part=slice(8, 16)).requests == workload.requests[8:16]


def test_a_recorded_run_counts_all_its_work(run):
    """What the steps computed sums to the engine's own counters, and each request gets what it asked for."""
    answers, prompts, again = map(sum, zip(*run.work()))
    workload = course_workload(6)
    assert [len(token_ids) for token_ids in run.token_ids] == [request.max_tokens for request in workload.requests]
    assert answers + prompts + again == run.stats.num_scheduled_tokens
    assert (prompts, again) == (workload.num_prompt_tokens, run.stats.num_recomputed_tokens)
    assert all(filled <= owned for filled, owned in run.slots())


def test_rows_are_watched_until_the_last_answer():
    """Each request ends with all its tokens in its row, one fewer than it has: the last is never computed."""
    workload, most = course_workload(6), dict[int, int]()
    for step in seat_rows(workload, 2):
        most.update(dict(step.values()))
    assert most == {number: len(request.prompt_token_ids) + request.max_tokens - 1
                    for number, request in enumerate(workload.requests)}


# ---- Lessons 12 to 14 ----

SMALL = {"model": str(draft_path()), "num_blocks": 33, "block_size": 16, "max_model_len": 256, "max_num_seqs": 3}


def test_guesses_are_counted_like_the_engine_counts_them():
    """What the ribbons show sums to the engine's own counters, request by request and step by step."""
    run = run_engine(taught_workload(max_tokens=12), speculative_config={"num_speculative_tokens": 3}, num_blocks=65,
                     block_size=16, max_model_len=256)
    accepted, own, refused = map(sum, zip(*(cell for _, row in guesses(run) for cell in row)))
    stats = run.stats
    assert accepted + own == stats.num_generated_tokens == 8 * 12, f"{accepted} accepted and {own} of the model's own"
    assert (accepted, accepted + refused) == (stats.num_accepted_tokens, stats.num_draft_tokens), f"{refused} refused"


def test_clients_are_served_all_the_same_and_wait_in_turn():
    """Any number of clients gets every token; with more clients than seats somebody waits, and nobody else does."""
    workload = course_workload(6)
    served = {number: serve_clients(workload, number, **SMALL) for number in (1, 3, 6)}
    for number, one in served.items():
        assert one.num_tokens == workload.num_output_tokens, f"{number} clients got {one.num_tokens} tokens"
        assert max(one.running) == min(number, 3), f"{number} clients: {max(one.running)} requests at once"
        assert (max(one.waiting) > 0) == (number > 3), f"{number} clients: up to {max(one.waiting)} wait"
    assert len(served[1].running) > len(served[3].running), "clients share steps"


def test_who_leaves_leaves_nothing_behind():
    """Clients that leave in the queue or in the middle of an answer give every block back before the next step."""
    departures, num_read, num_missing = leave_at_random(course_workload(12), 3, chance=0.1, **SMALL)
    assert len(departures) + num_read == 12 and {one.was_running for one in departures} == {True, False}, f"{departures}"
    assert any(one.held_before for one in departures), "nobody who left had blocks"
    assert num_missing == 0 and not any(one.held_after or one.num_steps for one in departures), f"{departures}"


def test_a_slow_reader_is_handed_everything_at_once():
    """A reader that looks in after every 4 steps knows 4 tokens more each time."""
    assert read_every(BenchRequest([300, 301, 302], 10), 4, **SMALL) == [4, 8, 10]


def test_launches_are_counted_and_views_are_not():
    """Three operations that write count, a transposed view does not; every layer has as many as the next."""
    x = torch.ones(2, 3)
    assert dict(launches(lambda: (x + 1).t().mul(2).exp())) == {"add": 1, "mul": 1, "exp": 1}
    one, two, three = (launches(DecodeStep(layers=layers).plain).total() for layers in (1, 2, 3))
    assert three - two == two - one > 20, f"{one}, {two} and {three} operations for one, two and three layers"


def test_the_stand_in_replays_what_a_step_computes():
    """A replayed step gives the tokens and the KV of one that was computed, and asks for nothing while the batch is the same."""
    plain, replayed = DecodeStep(layers=2), DecodeStep(layers=2)
    graph = replayed.use_stand_in()
    for number in range(3):
        assert plain.run().tolist() == replayed.run().tolist(), f"step {number} gives other tokens"
    assert torch.equal(plain.kv, replayed.kv) and graph.num_replays == 3, f"{graph.num_replays} replays"
    assert launches(replayed.run).total() == 0, "the host uploads for the same batch"


def test_what_was_recorded_is_found_from_the_lessons_folder(monkeypatch, tmp_path):
    """A notebook runs in lessons/ and finds the ledger; outside of a clone the error says where to stand."""
    monkeypatch.chdir(ROOT / "lessons")
    assert recorded("h200-0.5b-anatomy.json")["environment"]["device"] == "NVIDIA H200"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="in a clone"):
        recorded("h200-0.5b-anatomy.json")
