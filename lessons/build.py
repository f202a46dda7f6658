"""From `lessons/NN_name.py` to the notebook beside it and to `docs/lessons/NN_name.md` with its pictures.

    python lessons/build.py                 run every lesson and write what it shows
    python lessons/build.py 07 09           only these
    python lessons/build.py --check         run every lesson, compare with what is committed, byte by byte

A lesson is plain Python in which `# %% [markdown]` begins prose and `# %%` code (py:percent, as VS Code, Spyder and jupytext
read it). A run is repeatable: one thread, no network, no clock, cell ids that count, nothing about the machine. A notebook's
first code cell has two lines that the source has not: whoever saves a file in `mine/` has the new code in the next cell that runs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

LESSONS = Path(__file__).resolve().parent
PAGES = LESSONS.parent / "docs" / "lessons"
PAGE = """{% extends 'markdown/index.md.j2' %}
{% block stream %}
```text
{{ output.text.rstrip() }}
```
{% endblock stream %}
{% block data_text %}
```text
{{ output.data['text/plain'].rstrip() }}
```
{% endblock data_text %}
{% block data_svg %}![picture]({{ output.metadata.filenames['image/svg+xml'] }})
{% endblock data_svg %}
"""
AUTORELOAD = "%load_ext autoreload\n%autoreload 2\n\n"
ANSI = re.compile(r"\x1b\[[0-9;]*m")
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
         "MINIVLLM_LOGGING_LEVEL": "ERROR", "PYDEVD_DISABLE_FILE_VALIDATION": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}


def sources() -> list[Path]:
    return sorted(LESSONS.glob("[0-9][0-9]_*.py"))


def source_hash(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()


def parse(source: str) -> list[tuple[str, str]]:
    """The cells of a lesson, ("markdown" or "code", text), in order. A line `# %%` begins one."""
    cells: list[tuple[str, list[str]]] = []
    for line in source.splitlines():
        if line.startswith("# %%"):
            cells.append(("markdown" if "[markdown]" in line else "code", []))
        elif cells:
            cells[-1][1].append(line)
        elif line.strip():
            raise ValueError(f"a lesson begins with a line `# %% [markdown]`, not with {line!r}")
    texts = [(kind, "\n".join(uncomment(lines) if kind == "markdown" else lines).strip("\n")) for kind, lines in cells]
    return [(kind, text) for kind, text in texts if text]


def uncomment(lines: list[str]) -> list[str]:
    """Prose without its `# `. A line of prose that is no comment would be lost code, so it is an error."""
    for line in lines:
        if line.strip() and not line.startswith("#"):
            raise ValueError(f"prose is written as comments: {line!r}")
    return [line.removeprefix("#").removeprefix(" ") for line in lines]


def to_notebook(source: str) -> nbformat.NotebookNode:
    """The notebook without outputs. Its cells have numbers as ids, so that building twice gives one file."""
    make = {"markdown": new_markdown_cell, "code": new_code_cell}
    cells = [make[kind](text, id=f"cell-{number}") for number, (kind, text) in enumerate(parse(source))]
    first = next((cell for cell in cells if cell.cell_type == "code"), None)
    if first is not None:
        first.source = AUTORELOAD + first.source
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={
        "kernelspec": kernel, "language_info": {"name": "python"}, "minivllm": {"source_sha256": source_hash(source)}})


def execute(path: Path) -> nbformat.NotebookNode:
    """Run a lesson in the lessons folder. Raises if a cell fails, or if one writes to stderr: a warning is not an output."""
    source = path.read_text(encoding="utf-8")
    notebook = to_notebook(source)
    clean = to_notebook(source).metadata
    NotebookClient(notebook, timeout=120, record_timing=False, kernel_name="python3",
                   resources={"metadata": {"path": str(LESSONS)}}).execute(stderr=subprocess.DEVNULL)
    notebook.metadata = clean  # the kernel adds the version of Python
    for cell in notebook.cells:
        cell.metadata = {}
        if "outputs" in cell:
            cell.outputs = joined(cell.outputs)
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise RuntimeError(f"{path.name} writes to stderr: {output.text}")
    return notebook


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Outputs in which text that follows text is one: the kernel of a busy machine may send a line and its end apart."""
    whole: list[nbformat.NotebookNode] = []
    for output in outputs:
        if whole and output.output_type == whole[-1].output_type == "stream" and output.name == whole[-1].name:
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def render(path: Path) -> dict[Path, str]:
    """Run a lesson and return every file made of it: path -> text."""
    notebook = execute(path)
    files = {path.with_suffix(".ipynb"): nbformat.writes(notebook, indent=1) + "\n"}
    exporter = MarkdownExporter(raw_template=PAGE)
    names = {"unique_key": path.stem, "output_files_dir": path.stem}
    body, resources = exporter.from_notebook_node(notebook, resources=names)
    for name, data in resources["outputs"].items():
        files[PAGES / name.replace("\\", "/")] = data.decode("utf-8").rstrip("\n") + "\n"
    files[PAGES / f"{path.stem}.md"] = for_the_site(body, path.stem)
    return files


def for_the_site(body: str, stem: str) -> str:
    """The exporter's Markdown with single blank lines and without what only a notebook needs, and where it came from."""
    origin = f"*This page is `lessons/{stem}.py`, run. `lessons/{stem}.ipynb` is the same as a notebook.*\n"
    return re.sub(r"\n{3,}", "\n\n", body.replace(AUTORELOAD, "")).strip("\n") + "\n\n" + origin


def pages_of(path: Path) -> set[Path]:
    """What an earlier build of a lesson has left."""
    return {*(PAGES / path.stem).glob("*"), PAGES / f"{path.stem}.md", path.with_suffix(".ipynb")}


def build(paths: list[Path], check: bool) -> int:
    """Run the lessons, two at a time, and write their files or compare them. The exit status."""
    os.environ |= QUIET
    os.environ.pop("MINIVLLM_MINE", None)  # the site shows the reference; a learner's notebooks run on what the learner has
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        os.environ["IPYTHONDIR"] = folder  # nobody's startup files
        runs = [(path, pool.submit(render, path)) for path in paths]
    rendered = [run.result() for _, run in runs if run.exception() is None]
    failed = {path.name: run.exception() for path, run in runs if run.exception() is not None}
    for name, error in failed.items():
        print(f"failed: {name}: {ANSI.sub('', str(error))}", file=sys.stderr)
    if failed:
        return 1
    stale = []
    for path, files in zip(paths, rendered):
        same = {file: file.is_file() and file.read_text(encoding="utf-8") == text for file, text in files.items()}
        left_over = {file for file in pages_of(path) - files.keys() if file.is_file()}
        stale += [file for file, is_same in same.items() if not is_same] + sorted(left_over)
        if not check:
            for file in left_over:
                file.unlink()
            for file, text in files.items():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
    names = ", ".join(str(file.relative_to(LESSONS.parent)) for file in stale)
    if check and stale:
        print(f"stale: {names}. Run python lessons/build.py and commit.", file=sys.stderr)
        return 1
    print(f"{len(paths)} lessons ran; " + ("all files are up to date" if not stale else f"written: {names}"))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the lessons; write notebooks and pages, or check them.")
    parser.add_argument("lessons", nargs="*", help="numbers, 07 or 7 (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file differs from what the run gives")
    args = parser.parse_args()
    wanted = {int(number) for number in args.lessons}
    paths = [path for path in sources() if not wanted or int(path.name[:2]) in wanted]
    if not paths:
        parser.error(f"no lesson has a number among {', '.join(args.lessons)}")
    return build(paths, args.check)


if __name__ == "__main__":
    sys.exit(main())
