"""The live page in a real browser: chat, blocks that come and go, pause and step, a recorded trace, the key, small screens."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import threading

import pytest

pytest.importorskip("fastapi", reason="the server's tests need fastapi")
pytest.importorskip("playwright", reason="the page's tests need playwright (pip install -e '.[dev]')")

from playwright.sync_api import sync_playwright
from serve_process import ServeProcess
from telling import is_learners
from test_engine import greedy, make_llm, prompts_of

from minivllm.scheduler import Scheduler
from minivllm.serve.page import FILES, FOLDER
from minivllm.trace import read_trace, replay

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page's tests need Chromium on the path (apt install chromium)")
KEY = "a-key-for-tests"
WAIT_MS = 15_000
USED = r"KV cache: [1-9]\d* of 47 blocks in use"
UNUSED = "KV cache: 0 of 47 blocks in use"


@pytest.fixture(scope="module")
def server():
    """The embedded model, with so few blocks that eight requests do not fit."""
    with ServeProcess("--step-control", "--api-key", KEY, "--num-blocks", 48, "--max-num-batched-tokens", 128) as one:
        yield one


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(server, browser):
    """The page, live and with its key; afterwards it has asked nobody else for anything, and logged no error."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(WAIT_MS)
    context.add_init_script(f"sessionStorage.setItem('minivllm-api-key', '{KEY}')")
    page, errors, asked = context.new_page(), [], set()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.add(request.url))
    page.goto(server.url + "/")
    page.wait_for_selector("[data-status=live]")
    yield page
    if page.is_visible("#resume"):
        page.click("#resume")
    context.close()
    assert not [error for error in errors if "the server responded with" not in error]  # a refusal that the page then shows
    assert all(url.startswith(server.url + "/") for url in asked)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A trace with chunked prompts, prefix hits, waits and preemptions."""
    path = str(tmp_path_factory.mktemp("trace") / "run.trace.jsonl")
    llm = make_llm(num_blocks=14, max_num_batched_tokens=9, trace=path)
    prompts = prompts_of(9, 14, 9, 5, 12, 7)
    llm.enqueue([prompts[0], *prompts], greedy(14))
    llm.wait_for_completion(use_tqdm=False)
    llm.close()
    return path


def wait_for_blocks(page, pattern):
    """What a screen reader is told of the canvas."""
    page.wait_for_function("pattern => new RegExp(pattern).test(document.querySelector('.blocks').ariaLabel)", arg=pattern)


def wait_for_text(page, selector, text):
    page.wait_for_function("([selector, text]) => document.querySelector(selector)?.textContent.includes(text)",
                           arg=[selector, text])


def wait_for_rows(page, queue, number):
    page.wait_for_function("([queue, number]) => document.querySelectorAll(`ul.${queue} li:not([hidden])`).length === number",
                           arg=[queue, number])


def step_of(page):
    return int(page.inner_text("h2 .number").replace(",", ""))


def test_a_chat_round_trip_takes_blocks_and_gives_them_back(page):
    """An example question is answered in words, its blocks appear, and in the end all are free."""
    page.click("#pause")  # or it may all be over before the first picture
    page.click("text=Tell me a story about a fox.")
    wait_for_text(page, "ul.waiting", "yours; next in turn")
    page.click("#step")
    wait_for_blocks(page, USED)
    page.click("#step")
    wait_for_text(page, "ul.running", "yours")
    page.click("#resume")
    wait_for_text(page, ".message.assistant .note", "the first after")
    assert len(page.inner_text(".message.assistant .text").split()) > 10
    wait_for_blocks(page, UNUSED)
    wait_for_text(page, ".decisions", "ends (stop)")
    page.fill("#question", "What is a block?")
    page.press("#question", "Enter")
    wait_for_text(page, ".message.assistant:last-child .note", "from the cache")


def test_stop_ends_an_answer_and_a_wrong_question_is_explained(page):
    """Stop aborts the request, also one that waits; an error of the server is shown in its words."""
    page.click("#pause")
    page.fill("#question", "What is a block?")
    page.click("#send")
    wait_for_text(page, "ul.waiting", "next in turn")
    page.click("#send")
    wait_for_text(page, ".message.assistant .note", "Stopped")
    page.wait_for_selector("text=The queue is empty.")
    page.fill("#question", "word " * 3000)
    page.click("#send")
    wait_for_text(page, ".message.assistant:last-child .note", "maximum context length")


@pytest.mark.skipif(is_learners(Scheduler), reason="a learner's scheduler may decide without a word")
def test_pause_step_and_read_why(page):
    """Eight requests wait while the engine is held; each press is one step; the scheduler says who waits for what."""
    page.click("#pause")
    page.wait_for_selector("[data-status=paused]")
    page.click("#eight")
    wait_for_rows(page, "waiting", 8)
    before = step_of(page)
    for number in (1, 2, 3):
        page.click("#step")
        wait_for_text(page, "h2 .number", f"{before + number:,}")
    assert page.locator("ul.running li:not([hidden])").count() == 8
    assert "computes 1 token, takes 0 blocks" in page.inner_text(".decisions .now >> nth=0")
    page.click("#resume")
    wait_for_text(page, ".decisions", "waits: needs")
    wait_for_text(page, ".decisions", "back: 0 free and request")
    wait_for_text(page, "#experiment-status", "8 answered")
    wait_for_blocks(page, UNUSED)


def test_shared_blocks_and_the_keyboard(page):
    """Two requests with one prefix share blocks; arrow keys go from block to block, and a request shows its table."""
    page.click("#pause")
    page.click("#prefix")
    wait_for_rows(page, "waiting", 2)
    for _ in range(4):  # 251 tokens in steps of 128
        page.click("#step")
    wait_for_rows(page, "running", 2)
    page.focus("ul.running button")
    wait_for_text(page, "#inspector", "Block table of request")
    table = [int(block) for block in page.inner_text("#inspector").partition(": ")[2].split()]
    page.focus(".blocks")
    for _ in range(table[0]):
        page.keyboard.press("ArrowRight")
    wait_for_text(page, "#inspector", f"Block {table[0]} has positions 0 to 15")
    assert "It is shared with request" in page.inner_text("#inspector")


def test_a_recorded_trace_opens_and_moves(page, recorded, tmp_path):
    """By picker and by drop; forwards, backwards and by slider; a file that is none is refused in words; back to live."""
    last = [record for record in read_trace(recorded) if record["type"] == "step"][-1]["step"]
    page.set_input_files("#file", recorded)
    wait_for_text(page, ".place", f"step 0 of {last}")
    page.click("[aria-label='Forward one step']")
    wait_for_text(page, ".place", f"step 1 of {last}")
    wait_for_text(page, ".decisions", "request 1 starts behind 0 cached positions")
    page.focus(".player input")
    page.keyboard.press("End")
    wait_for_text(page, "h2 .number", str(last))
    page.click("[aria-label='Back one step']")
    wait_for_text(page, "h2 .number", str(last - 1))
    page.click("text=Close trace")
    page.wait_for_selector("[data-status=live]")
    (tmp_path / "none.txt").write_text("hello\nthere\n")
    page.set_input_files("#file", str(tmp_path / "none.txt"))
    wait_for_text(page, "#problem", "line 1 is not JSON")
    with open(recorded, encoding="utf-8") as file:
        page.evaluate("""text => {
          const data = new DataTransfer();
          data.items.add(new File([text], "dropped.jsonl"));
          window.dispatchEvent(new DragEvent("drop", {dataTransfer: data, cancelable: true}));
        }""", file.read())
    wait_for_text(page, ".file", "dropped.jsonl")
    page.click("[aria-label='Play']")
    page.wait_for_function("() => Number(document.querySelector('h2 .number').textContent) > 2")


def test_the_page_replays_a_trace_as_python_does(page, recorded):
    """state.js and `replay` rebuild the same requests, tables, queues and cache after every step."""
    records = read_trace(recorded)
    seen = page.evaluate("""async records => {
      const { EngineState } = await import("./static/state.js");
      const state = new EngineState();
      return records.map((record) => {
        state.apply(record);
        return JSON.stringify({step: state.step, requests: [...state.requests], waiting: state.waiting, free: state.freeBlocks,
          cached: [...state.cached].sort((a, b) => a - b),
          owners: [...state.blockOwners()].map(([block, held]) => [block, held.map(({ name }) => name)])});
      }).filter((_, index) => records[index].type === "step" || index === 1);
    }""", records)
    states = 0
    for state, text in zip(replay(records), seen, strict=True):
        states += 1
        assert json.loads(text) == {
            "step": state.step, "requests": [list(item) for item in state.requests.items()], "waiting": state.waiting,
            "free": state.free_blocks, "cached": sorted(state.cached),
            "owners": [list(item) for item in state.block_owners().items()],
        }, f"after step {state.step}"
    assert states > 20


def test_the_key_is_asked_for(server, browser):
    """The page loads without a key, asks for it, says when it is wrong, and then goes on where it was."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url + "/")
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    wait_for_text(page, "#key-problem", "does not know this key")
    page.fill("#key", KEY)
    page.click("text=Continue")
    page.wait_for_selector("[data-status=live]")
    wait_for_text(page, "#model", "minivllm-tiny")
    context.close()


class Proxy:
    """A reverse proxy that shows a server under /llm and takes that off: one request a connection, bytes as they come."""

    def __init__(self, url: str) -> None:
        self.upstream = ("127.0.0.1", int(url.rpartition(":")[2]))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/llm"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed: the end
            while True:
                threading.Thread(target=self._serve, args=(self.listener.accept()[0],), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        head = b""
        with client, socket.create_connection(self.upstream) as server, contextlib.suppress(OSError):
            while b"\r\n\r\n" not in head and (piece := client.recv(65536)):
                head += piece
            method, path, rest = head.split(b" ", 2)
            path = path.removeprefix(b"/llm") or b"/"
            server.sendall(b" ".join((method, path, rest.replace(b"Connection: keep-alive", b"Connection: close"))))
            threading.Thread(target=self._pump, args=(client, server), daemon=True).start()
            self._pump(server, client)

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                target.sendall(piece)
            target.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.listener.close()


@pytest.mark.parametrize("slash", ["", "/"], ids=["without a slash", "with a slash"])
def test_the_page_works_under_a_proxys_path_and_a_key(browser, slash):
    """--root-path /llm, at /llm and at /llm/: the page loads, asks for the key, answers, and shows the engine."""
    flags = ("--root-path", "/llm", "--step-control", "--api-key", KEY, "--num-blocks", 48, "--async-scheduling")
    with ServeProcess(*flags) as server, Proxy(server.url) as proxy:
        context = browser.new_context()
        context.set_default_timeout(WAIT_MS)
        page, asked = context.new_page(), set()
        page.on("request", lambda request: asked.add(request.url))
        page.goto(proxy.url + slash)
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        page.wait_for_selector("[data-status=live]")
        wait_for_text(page, "#model", "minivllm-tiny")
        wait_for_text(page, "#status", "Live, slower while watched")  # it plans a step ahead, see the last flag
        page.fill("#question", "What is a block?")
        page.press("#question", "Enter")
        wait_for_text(page, ".message.assistant .note", "the first after")
        wait_for_text(page, ".decisions", "ends (")
        page.click("#pause")
        page.wait_for_selector("[data-status=paused]")
        page.click("#resume")
        page.wait_for_selector("[data-status=live]")
        context.close()
    assert all(url.startswith(proxy.url) for url in asked), asked


def test_who_has_no_key_is_asked_once(server, browser):
    """After Escape the page says what it lacks, and leaves its reader alone."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url + "/")
    page.wait_for_selector("#key-dialog[open]")
    page.keyboard.press("Escape")
    wait_for_text(page, "#problem", "wants an API key")
    page.wait_for_timeout(1200)  # two attempts later
    assert not page.is_visible("#key-dialog")
    context.close()


def test_a_static_page_embeds_a_recorded_trace(browser, recorded):
    """Files and no server: the address in the attribute or in the page's own address, or else a file of the reader's."""
    context = browser.new_context()

    def serve(route):
        name = route.request.url.partition("docs.test/")[2].partition("?")[0]
        if name == "run.jsonl":
            route.fulfill(path=recorded)
        elif name in FILES:
            route.fulfill(path=str(FOLDER / name))
        else:
            attribute = "run.jsonl" if name == "fixed" else ""
            route.fulfill(content_type="text/html", body=f"""<!doctype html><link rel="stylesheet" href="viewer.css">
              <div data-trace="{attribute}"></div><script type="module" src="embed.js"></script>""")

    context.route("http://docs.test/**", serve)
    page = context.new_page()
    for address in ("fixed", "any?trace=run.jsonl"):
        page.goto(f"http://docs.test/{address}")
        wait_for_text(page, ".place", "step 0 of")
        page.click("[aria-label='Forward one step']")
        wait_for_text(page, ".decisions", "request 1 starts")
        assert not page.is_visible("text=Close trace")
    page.goto("http://docs.test/any")
    page.set_input_files("[type=file]", {"name": "none.jsonl", "mimeType": "", "buffer": b"no trace"})
    wait_for_text(page, "[role=alert]", "none.jsonl")
    page.set_input_files("[type=file]", recorded)
    wait_for_text(page, ".place", "step 0 of")
    assert not page.inner_text("[role=alert]"), "what was wrong with the first file is still said"
    context.close()


@pytest.mark.parametrize(("width", "scheme"), [(340, "light"), (390, "dark"), (800, "light"), (1280, "dark")])
def test_nothing_is_wider_than_the_screen(page, width, scheme):
    """On phones and beside, light and dark: no sideways scrolling, with requests, decisions and a long table on show."""
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    page.click("#pause")
    page.click("#prefix")
    wait_for_rows(page, "waiting", 2)
    page.click("#step")
    page.wait_for_selector(".decisions .now")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    wide = page.evaluate("""() => [...document.querySelectorAll('header *, main *')].filter((element) =>
      element.clientWidth && element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).overflowX === 'visible'
      && getComputedStyle(element).display !== 'inline').map((element) => element.outerHTML.slice(0, 80))""")
    assert not wide, f"these overflow: {wide}"
    color = page.evaluate("getComputedStyle(document.querySelector('.panel')).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", color))) < 200) == (scheme == "dark"), f"panels are {color} in {scheme}"
