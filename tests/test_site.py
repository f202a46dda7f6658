"""The site: its pictures show what the code does, its pages name what exists, and it asks nobody else for anything."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minivllm.trace import read_trace, replay

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))  # lessons end with the names of vLLM's files


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def imports_of(name: str) -> set[str]:
    """The modules of the package that this one imports, as `engine` or `serve.app`."""
    tree = ast.parse((ROOT / "minivllm" / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minivllm"):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {module.removeprefix("minivllm.") for module in found}


def test_every_solid_arrow_of_the_flow_is_an_import():
    """The picture of the modules shows no way that the code does not have, and the committed file is what the script draws."""
    flow = load("make_flow")
    missing = [(start, end) for start, end in flow.ARROWS if end not in imports_of(start)]
    assert not missing, f"arrows without an import: {missing}"
    assert flow.PICTURE.read_text(encoding="utf-8") == flow.picture(), "run python docs/make_flow.py and commit"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_name_modules_that_exist(page):
    """Every `module.py` that a page names is a file of the package, the tests or the docs."""
    ours = page.read_text(encoding="utf-8")
    if page.stem == "read_vllm":  # its second column is vLLM's
        ours = "\n".join(line.split("|")[1] for line in ours.splitlines() if line.startswith("|"))
    named = set(re.findall(r"`((?:[\w]+/)*\w+\.py)`", ours))
    missing = [name for name in named if not any((ROOT / folder / name).exists() for folder in ("minivllm", "tests", "", "docs"))]
    assert not missing, f"{page.name} names {missing}"


@pytest.mark.parametrize("name", ["continuous", "preemption", "prefix"])
def test_recorded_traces_show_what_the_page_says(name):
    """Each trace replays to its end, where nothing runs; one preempts, one shares blocks and computes a prompt in chunks."""
    records = read_trace(str(DOCS / "trace" / f"{name}.jsonl"))
    *_, last = replay(records)
    steps = [record for record in records if record["type"] == "step"]
    assert not last.requests and last.waiting["count"] == 0, "all requests end"
    assert any(step["preempted"] for step in steps) == (name == "preemption"), "preemptions are in one of the three"
    if name == "prefix":
        assert any(entry["num_computed_tokens"] for step in steps for entry in step["admitted"].values()), "a prefix was found"
        longest = max(entry["num_prompt_tokens"] for step in steps for entry in step["admitted"].values())
        assert longest > max(sum(step["scheduled"].values()) for step in steps), "the long prompt takes several steps"


def test_the_site_builds_strictly_and_asks_nobody_else(tmp_path):
    """Every link and page is there, no page is over 100 KB, and no page loads anything from another host."""
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True, timeout=120, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    for page in tmp_path.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        assert len(html) < 100_000, f"{page.relative_to(tmp_path)} has {len(html):,} characters"
        loaded = re.findall(r'<(?:script|link|img|iframe)[^>]*?(?:src|href)="(?:https?:)?//[^"]*"', html)
        outside = [tag for tag in loaded if 'rel="canonical"' not in tag]
        assert not outside, f"{page.relative_to(tmp_path)} loads {outside[:3]}"
    assert (tmp_path / "trace" / "embed.js").exists() and (tmp_path / "ledger" / "cpu-scheduler.json").exists()
