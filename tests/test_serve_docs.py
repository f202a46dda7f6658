"""The API page is what the code says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the server's tests need fastapi")

from serve_doubles import ask

from minivllm.serve.fields import ACCEPTED, REFUSED
from minivllm.serve.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

DOCS = Path(__file__).parent.parent / "docs"


def test_the_api_page_is_the_one_that_the_code_writes():
    """A field or a limit that changes in the code changes the page: `python docs/make_api.py` writes it anew."""
    written = runpy.run_path(str(DOCS / "make_api.py"))["page"]()
    assert (DOCS / "api.md").read_text(encoding="utf-8") == written, "run: python docs/make_api.py"


def test_every_field_and_every_route_is_on_the_api_page():
    """Read, accepted or refused: each has its row, and none has two meanings."""
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    for body in (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody):
        for name in body.model_fields:
            assert f"| `{name}` |" in page, name
            assert name not in ACCEPTED and name not in REFUSED, f"{name} is read, so it is neither ignored nor refused"
    for name in (*ACCEPTED, *REFUSED):
        assert f"| `{name}` |" in page, name
    assert not ACCEPTED.keys() & REFUSED.keys()
    for path in ask("/openapi.json", method="GET").json()["paths"]:
        assert f"{path}`" in page, f"the page does not speak of {path}"
