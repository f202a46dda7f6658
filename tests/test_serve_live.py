"""The live page's server side: files, who may see and hold the engine, and what watching it costs."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time

import pytest

pytest.importorskip("fastapi", reason="the server's tests need fastapi")

import httpx
from serve_doubles import ask, client_of
from serve_process import InFlight, ServeProcess, make_model_folder

from minivllm import LLM, SamplingParams
from minivllm.async_engine import AsyncEngine
from minivllm.serve import live as live_module
from minivllm.serve.live import Live, Watcher
from minivllm.serve.page import FILES, FOLDER, MEDIA_TYPES, PAGE_PATHS
from minivllm.trace import replay

JSON = {"content-type": "application/json"}
LONG = SamplingParams(max_tokens=2000, temperature=0, ignore_eos=True)
SHORT = {"prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


def on_engine(folder, story):
    """Run `story(engine)` on a real engine on its thread."""
    async def main():
        llm = LLM(str(folder), max_model_len=2048, block_size=4, num_blocks=600, device="cpu", max_num_seqs=4)
        engine = AsyncEngine(llm.engine)
        try:
            return await asyncio.wait_for(story(engine), 60)
        finally:
            engine.shutdown()

    return asyncio.run(main())


async def until(holds, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "this should have come true by now"
        await asyncio.sleep(0.01)


async def records_until(stream, holds):
    """All records up to the first one for which `holds`."""
    records = []
    async for event in stream:
        records += event["records"]
        if any(map(holds, records)):
            break
    return records


# The page ---------------------------------------------------------------------------------------------------------------------


def test_the_page_is_small_and_asks_nobody_else_for_anything():
    """No inline code, no foreign address, under 100 KB, and a policy that lets nothing else in."""
    page = ask("/", method="GET")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert not re.search(r"<style|<script(?![^>]* src=)| style=| on\w+=", page.text), "the policy would refuse inline code"
    for name in FILES:
        foreign = set(re.findall(r"https?://[^\s\"'<>)]+", (FOLDER / name).read_text())) - {"http://www.w3.org/2000/svg"}
        assert not foreign, f"{name} names {foreign}"
        lines = (FOLDER / name).read_text().splitlines()
        assert name.endswith(".svg") or (len(lines) <= 300 and max(map(len, lines)) <= 132), f"{name} is too long or too wide"
    assert sum(len((FOLDER / name).read_bytes()) for name in FILES) < 100_000


def test_every_part_is_served_with_its_type_and_remembered_by_the_browser():
    """200 with a tag, then 304; what is not a part of the page is not found, whatever its path looks like."""
    for name in sorted(FILES):
        first = ask(f"/static/{name}", method="GET")
        assert first.status_code == 200
        assert first.headers["content-type"].startswith(MEDIA_TYPES[name.rpartition(".")[2]])
        again = ask(f"/static/{name}", method="GET", headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    for path in ("/static/none.js", "/static/..%2Flive.py", "/static/%2e%2e/live.py"):
        assert ask(path, method="GET").status_code == 404


def test_with_a_key_the_page_is_open_and_what_it_shows_is_not():
    """The page can ask for the key; the trace and the engine's buttons want it."""
    for path in PAGE_PATHS:
        assert ask(path, method="GET", api_keys=("secret",)).status_code == 200
    for method, path in (("GET", "/trace"), ("GET", "/control"), ("POST", "/control/pause"), ("POST", "/control/step")):
        assert ask(path, {}, method=method, api_keys=("secret",), step_control=True).status_code == 401, path


# Holding the engine -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["pause", "step", "resume"])
def test_nobody_holds_an_engine_that_was_started_without_the_flag(action):
    """403 with the way out; with the flag, a request that a foreign page could make is refused as well."""
    error = ask(f"/control/{action}", {}).json()["error"]
    assert (error["code"], error["type"]) == (403, "PermissionDeniedError")
    assert "--step-control" in error["message"]
    foreign = ask(f"/control/{action}", content=b"{}", headers={"content-type": "text/plain"}, step_control=True)
    assert foreign.status_code == 400, "a form may be sent across origins, JSON may not"


def test_pause_step_and_resume_make_exactly_the_steps_that_were_asked_for(folder):
    """A step per press, none in between, and resuming finishes what waits."""
    async def story(engine):
        async with client_of(engine, step_control=True) as client:
            async def press(action):
                return (await client.post(f"/control/{action}", json={})).json()

            assert (await press("step"))["error"]["code"] == 409
            assert await press("pause") == {"allowed": True, "paused": True, "step": 0, "slows": False}
            answer = asyncio.ensure_future(client.post("/v1/completions", json=SHORT))
            await until(lambda: engine.engine.scheduler.requests)
            assert [(await press("step"))["step"] for _ in range(3)] == [1, 2, 3]
            await asyncio.sleep(0.1)
            assert (await client.get("/control")).json()["step"] == 3, "nothing moves by itself"
            assert (await press("resume"))["paused"] is False
            assert (await answer).json()["usage"]["completion_tokens"] == 5
            await press("pause")
            assert (await press("step"))["step"] == 5, "with nothing to do a step is none"

    on_engine(folder, story)


# Watching ---------------------------------------------------------------------------------------------------------------------


def test_a_watcher_sees_every_step_and_nobody_s_tokens(folder):
    """Header, keyframe, steps without a gap; the numbers of sampled tokens and not their ids."""
    async def story(engine):
        stream = Live(engine, False)._events(Watcher())
        first = (await anext(stream))["records"]
        assert [record["type"] for record in first] == ["header", "keyframe"]
        outputs = await engine.add_request([1, 2, 3], SamplingParams(max_tokens=20, temperature=0, ignore_eos=True), "r")
        records = first + await records_until(stream, lambda record: record.get("finished"))
        steps = [record for record in records if record["type"] == "step"]
        assert [record["step"] for record in steps] == list(range(1, 21))
        assert all(record["sampled"] == {"r": 1} for record in steps)
        *_, state = replay(records)
        assert (state.step, state.requests, state.free_blocks) == (20, {}, 599)
        outputs.close()
        await stream.aclose()

    on_engine(folder, story)


def test_what_happens_between_steps_is_seen_while_the_engine_is_held(folder):
    """Requests that come, and one that is aborted, show without a step."""
    async def story(engine):
        stream = Live(engine, True)._events(Watcher())
        await anext(stream)
        await engine.pause()
        one, _ = [await engine.add_request([1, 2, 3], LONG, name) for name in ("one", "two")]
        await records_until(stream, lambda record: record.get("waiting", {}).get("first") == ["one", "two"])
        one.close()
        await records_until(stream, lambda record: record.get("waiting", {}).get("first") == ["two"])
        await stream.aclose()

    on_engine(folder, story)


def test_a_slow_watcher_is_let_go_and_begins_anew(folder, monkeypatch):
    """Its buffer ends at the limit, nothing more is recorded for it, and what it then reads is whole."""
    monkeypatch.setattr(live_module, "MAX_BUFFERED", 8)

    async def story(engine):
        watcher, core = Watcher(), engine.engine
        stream = Live(engine, False)._events(watcher)
        await anext(stream)
        outputs = await engine.add_request([1, 2, 3], LONG, "r")
        await until(lambda: core.stats.num_steps > 30)
        assert (len(watcher.records), watcher.recorder, core.trace.is_on) == (8, None, False)
        assert core.scheduler.record_decisions is False
        records = await records_until(stream, lambda record: record["type"] == "header")
        kinds = [record["type"] for record in records[:10]]
        assert kinds == ["step"] * 8 + ["header", "keyframe"]
        assert records[9]["requests"]["r"]["num_tokens"] > 30, "the new beginning is of now"
        outputs.close()
        await stream.aclose()

    on_engine(folder, story)


def test_when_the_last_watcher_leaves_nothing_is_recorded_any_more(folder, monkeypatch):
    """Whoever hangs up is unsubscribed at once, and not when its buffer is full; also in the middle of a request."""
    monkeypatch.setattr(live_module, "MAX_BUFFERED", 10**9)

    async def story(engine):
        live, core, has_left = Live(engine, False), engine.engine, asyncio.Event()

        async def receive():
            await has_left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        outputs = await engine.add_request([1, 2, 3], LONG, "r")
        watching = asyncio.ensure_future(live.watch()({"type": "http"}, receive, send))
        await until(lambda: core.trace.is_on and core.scheduler.record_decisions)
        has_left.set()
        await watching
        await until(lambda: not core.trace.is_on)
        assert (core.trace.listeners, core.scheduler.record_decisions, live.num_watchers) == ([], False, 0)
        outputs.close()

    on_engine(folder, story)


def test_there_is_a_limit_of_watchers(monkeypatch):
    """503 with a reason."""
    monkeypatch.setattr(live_module, "MAX_WATCHERS", 0)
    error = ask("/trace", method="GET").json()["error"]
    assert (error["code"], "watch this engine already" in error["message"]) == (503, True)


def frames(response):
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


@pytest.mark.parametrize("timeout", [0, 20], ids=["at once", "with time to finish"])
def test_a_server_that_is_watched_and_held_still_ends(folder, timeout):
    """Watchers are told, and a held engine goes on: with --shutdown-timeout its request gets its last token."""
    with ServeProcess(folder, "--step-control", "--shutdown-timeout", timeout, "--num-blocks", 400) as server:
        with httpx.stream("GET", server.url + "/trace", timeout=30) as watched, \
                httpx.stream("GET", server.url + "/trace", timeout=30) as other:
            events, others = frames(watched), frames(other)
            assert [record["type"] for record in next(events)["records"]] == ["header", "keyframe"]
            next(others)
            httpx.post(server.url + "/control/pause", json={})
            request = InFlight(server, max_tokens=8)
            while not any(record["waiting"]["count"] for record in next(events)["records"]):
                pass
            status, seconds = server.stop(signal.SIGINT)
            assert (status, seconds < 2) == (0, True), f"exit status {status} after {seconds:.1f} s"
            assert [list(event) for event in events][-1] == ["error"], "the watcher is told why its stream ends"
        reason = request.result().body["choices"][0]["finish_reason"]
        assert reason == ("length" if timeout else "abort")
        assert "Traceback" not in server.stderr
