"""The house rules that can be measured: walls between modules, sizes, and where a name may be imported."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "minivllm"
MODULES = sorted(PACKAGE.rglob("*.py"))
TORCH_FREE = ["block_pool", "kv_cache", "request", "sampling_params", "scheduler", "scheduler_output",
              "steps_in_flight", "config", "exceptions", "speculative", "speculative_config", "learn"]
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 300, 30
COURSE = ("learn", "learn_check", "learn_files", "exercises", "blanks", "viz", "viz_bands", "trace", "compare", "cost", "generate",
          "dense_cache", "slot_batching", "coursework", "course_clients", "course_launches")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
SPECULATION = ("speculative", "speculative_config", "draft_model", "rejection_sampling")
FAST_RUNGS = ("flex_attention", "compiled_model", "cuda_graphs", "prompt_graphs", "verify_graphs", "profile_run", "compile_cache",
              "compile_ahead", "one_token", "row_tiles", "split_linear", "warm_up", "graph_sampler", "mailbox",  # on a GPU
              "packed_linear", "standing_attention", "threads")  # on a CPU
NOT_ENGINE = ("serve", "bench", "tiny", "cli", *COURSE)


@pytest.mark.parametrize("name", ["minivllm", *(f"minivllm.{module}" for module in TORCH_FREE)])
def test_these_modules_import_no_torch(name):
    """The scheduler and everything below it can be read, tested and blanked without torch."""
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, timeout=60)
    assert done.returncode == 0, f"importing {name} imports torch"


def test_an_engine_on_a_cpu_does_not_import_the_compiler():
    """From import to answer nothing imports torch's compiler: that takes two seconds, and is of use on a GPU only."""
    code = ("import sys; from minivllm import LLM, SamplingParams; llm = LLM(max_model_len=64, num_blocks=8)\n"
            "llm.generate('a', SamplingParams(max_tokens=2), use_tqdm=False); sys.exit('torch._dynamo' in sys.modules)")
    on_cpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, timeout=60, env=on_cpu)
    assert done.returncode == 0, "torch._dynamo was imported"


@pytest.mark.parametrize("module", ["model", "attention", "dense_cache", "sampler"])
def test_tensor_modules_know_no_request(module):
    """What computes sees tensors: it imports neither requests nor the scheduler nor the KV manager."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    others = ("scheduler", "scheduler_output", "kv_cache", "block_pool", "engine", "input_batch")
    forbidden = {f"minivllm.{name}" for name in others}
    assert not imported & forbidden, f"{module}.py imports {imported & forbidden}"


def test_every_known_trap_has_a_test():
    """Each way in which engines like this one went wrong has a test that carries its number: test_t01_ to test_t49_."""
    names = " ".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    missing = [number for number in range(1, 50) if f"def test_t{number:02}_" not in names]
    assert not missing, f"traps without a test: {missing}"


def test_no_module_is_longer_than_a_sitting():
    """A module holds one idea, in at most 300 lines."""
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    long = {path: lines for path, lines in lengths.items() if lines > MAX_MODULE_LINES}
    assert not long, f"modules over {MAX_MODULE_LINES} lines: {long}"


def test_no_function_is_longer_than_a_screen():
    """A function is at most 30 lines long, its docstring not counted."""
    long = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                has_docstring = ast.get_docstring(node) is not None
                body = node.body[1:] if has_docstring else node.body
                lines = (node.end_lineno - body[0].lineno + 1) if body else 0
                if lines > MAX_FUNCTION_LINES:
                    long[f"{path.relative_to(PACKAGE)}:{node.name}"] = lines
    assert not long, f"functions over {MAX_FUNCTION_LINES} lines: {long}"


def count_code_lines(path: Path) -> int:
    """Lines that hold code: no blank line, no comment, no docstring."""
    source = path.read_text(encoding="utf-8")
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = {line for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in silent
             for line in range(token.start[0], token.end[0] + 1)}
    return len(lines - docstrings)


# Plumbing that says less than it should, with what it has: a number here may rise or leave, and no module may join.
LEAN = {"config": 0.22, "async_engine": 0.32}  # both have the 300 lines that a module may have
FEW_LINES = 20  # of code: below that a docstring is most of a module


def engine_modules() -> list[Path]:
    """The engine, its fast rungs and speculation."""
    return [path for path in MODULES if path.relative_to(PACKAGE).parts[0].removesuffix(".py") not in NOT_ENGINE]


def count_prose_lines(path: Path) -> tuple[int, int]:
    """Lines that hold prose, and how many of these are comments at the end of a line of code.

    Prose is what a docstring stands in, its blank lines with it, and every line with a comment.
    """
    source = path.read_text(encoding="utf-8")
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    comments = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT]
    tails = sum(not token.line.lstrip().startswith("#") for token in comments)
    return len(docstrings) + len(comments), tails


def test_the_engine_says_why():
    """Prose to code: 0.4 to 1.0 in every engine module, but for a list of lean ones that may only shrink; 0.45 to 0.8 in all."""
    prose = {path.stem: count_prose_lines(path) for path in engine_modules()}
    code = {path.stem: count_code_lines(path) for path in engine_modules()}
    ratio = {name: prose[name][0] / code[name] for name in code}
    for name, value in ratio.items():
        least = LEAN.get(name, 0.4)
        assert value >= least, f"{name}.py has {prose[name][0]} lines of prose for {code[name]} of code: {value:.2f}, below {least}"
        assert value <= 1.0 or code[name] < FEW_LINES, f"{name}.py has {value:.2f} lines of prose for a line of code"
    ready = [name for name in LEAN if ratio[name] >= 0.4]
    assert not ready, f"lean no more, so take them off the list: {ready}"
    average = sum(lines for lines, _ in prose.values()) / sum(code.values())
    assert 0.45 <= average <= 0.8, f"{average:.2f} lines of prose for a line of code"
    tails = sum(number for _, number in prose.values()) / sum(code.values())
    assert 0.05 <= tails <= 0.15, f"a comment stands at the end of {tails:.0%} of the lines of code"


def test_prose_is_counted_as_it_reads(tmp_path):
    """A docstring counts with its blank line, a comment once, and a comment behind code is one of the latter."""
    path = tmp_path / "module.py"
    path.write_text('"""One.\n\nTwo.\n"""\n\n# Three.\nx = 1  # four\ny = "# no comment"\n', encoding="utf-8")
    assert (count_prose_lines(path), count_code_lines(path)) == ((6, 1), 2)


def test_the_engine_can_be_read_in_an_afternoon():
    """The engine is at most 3,600 lines of code, its fast rungs 1,280 and speculation 405 more, both of which can be left out, with
    at most 0.7 lines of prose and space for each; server, bench, training program and course come on top.
    """
    engine = engine_modules()
    code = {path.stem: count_code_lines(path) for path in engine}
    rung = sum(code.pop(name) for name in FAST_RUNGS)
    guessing = sum(code.pop(name) for name in SPECULATION)
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in engine)
    assert sum(code.values()) <= 3600, f"the engine has {sum(code.values())} lines of code in {len(code)} modules"
    assert rung <= 1280, f"its fast rungs have {rung}"
    assert guessing <= 405, f"speculation has {guessing}"
    total = sum(code.values()) + rung + guessing
    assert lines <= 1.7 * total, f"{lines} lines for {total} lines of code"


def test_all_tests_share_the_cores_and_few_do_not():
    """The whole suite has a process for each core, up to four; tests asked for by name, or on one core, have none of their own."""
    from conftest import num_workers

    assert [num_workers(True, cores) for cores in (1, 2, 3, 64)] == [0, 2, 3, 4]
    assert num_workers(False, 64) == 0
