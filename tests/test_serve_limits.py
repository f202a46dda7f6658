"""What the server refuses to take on: bodies that are too large, prompts that cannot fit, and a queue that is full."""

from __future__ import annotations

import asyncio
import json

import pytest

pytest.importorskip("fastapi", reason="the server's tests need fastapi")

from serve_doubles import CHATML, ScriptedEngine, ask, client_of
from serve_process import make_model_folder

from minivllm import LLM, SamplingParams
from minivllm.async_engine import AsyncEngine
from minivllm.input_processor import MAX_CHARS_PER_TOKEN
from minivllm.serve.args import parse_args
from minivllm.serve.prompts import LONGEST_TEXT
from minivllm.serve.server import _raise_file_limit

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"content-type": "application/json"}
SHORT = {"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True, "temperature": 1, "seed": 5}
HI = [{"role": "user", "content": "Hi"}]


def error_of(response, status):
    """The error's four keys; the envelope has nothing else."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (set(response.json()), set(error), error["code"]) == ({"error"}, {"message", "type", "param", "code"}, status)
    return error


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


def make_llm(folder, **knobs) -> LLM:
    return LLM(str(folder), **{"max_model_len": 64, "block_size": 4, "num_blocks": 64, "device": "cpu", "max_num_seqs": 2} | knobs)


def serve(folder, story, *, limit=None, max_num_queued_tokens=None, **knobs):
    """Run `story(client, engine)` on a real engine, held between two steps; afterwards nothing waits, runs or owns a block."""
    async def main():
        engine = AsyncEngine(make_llm(folder, **knobs).engine)
        try:
            await engine.pause()
            async with client_of(engine, max_num_queued_reqs=limit, max_num_queued_tokens=max_num_queued_tokens) as client:
                result = await asyncio.wait_for(story(client, engine), 60)
                queue = client._transport.app.state.service.queue
                await engine.call(lambda core: core.kv_cache_manager.check())
                assert await counts(engine) == (0, 0)
                assert await engine.call(lambda core: core.kv_cache_manager.usage) == 0, "all blocks are back"
                assert queue is None or queue.num_coming == 0, "nobody's place is kept"
            return result
        finally:
            engine.shutdown()

    return asyncio.run(main())


async def counts(engine):
    """How many requests wait and how many run."""
    return await engine.call(lambda core: (len(core.scheduler.waiting), len(core.scheduler.running)))


def post(client, body=(), path=COMPLETIONS):
    return asyncio.create_task(client.post(path, json=SHORT | dict(body)))


async def until(engine, waiting, running):
    while await counts(engine) != (waiting, running):
        await asyncio.sleep(0.001)


async def fill(client, engine, waiting):
    """Two requests that run, which are all that may, and some that wait."""
    tasks = [post(client) for _ in range(2)]
    await until(engine, 2, 0)
    await engine.step_once()
    tasks += [post(client) for _ in range(waiting)]
    await until(engine, waiting, 2)
    return tasks


async def finish(engine, tasks, num_choices=1):
    await engine.resume()
    for response in await asyncio.gather(*tasks):
        assert response.status_code == 200, response.text
        assert [choice["finish_reason"] for choice in response.json()["choices"]] == ["length"] * num_choices


def assert_busy(response):
    error = error_of(response, 503)
    assert int(response.headers["retry-after"]) >= 1
    assert (error["type"], error["param"]) == ("Service Unavailable", None)
    assert "currently busy" in error["message"] or "prefill token backlog limit" in error["message"]


async def without_refused(tasks, num_refused):
    """Wait until so many have been refused, and return the others. The engine is paused, so nothing else ends."""
    while sum(task.done() for task in tasks) < num_refused:
        await asyncio.sleep(0.001)
    for task in tasks:
        if task.done():
            assert_busy(task.result())
    return [task for task in tasks if not task.done()]


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_answers_503_and_those_in_it_finish(folder, stream):
    """Below the limit a request waits its turn; at it, it is refused at once with Retry-After, and all the others finish."""
    async def story(client, engine):
        tasks = await fill(client, engine, waiting=2)
        tasks.append(post(client))
        await until(engine, 3, 2)
        usage = await engine.call(lambda core: core.kv_cache_manager.usage)
        for path, body in ((COMPLETIONS, SHORT), (CHAT, {"messages": [{"role": "user", "content": "Hi"}]})):
            assert_busy(await client.post(path, json=body | {"stream": stream}))
        assert await counts(engine) == (3, 2), "nothing came in, and nobody had to leave"
        assert await engine.call(lambda core: core.kv_cache_manager.usage) == usage
        assert (await client.post("/tokenize", json={"prompt": "Once"})).status_code == 200, "nothing to wait for"
        await finish(engine, tasks)
        assert (await client.post(COMPLETIONS, json=SHORT)).status_code == 200, "there is room again"

    serve(folder, story, limit=5)


@pytest.mark.parametrize("body", [{"prompt": [[1, 2], [3, 4], [5, 6]]}, {"n": 3}], ids=["prompts", "n"])
def test_a_body_of_three_answers_needs_three_places(folder, body):
    """A batch and n > 1 count by their children and come in whole or not at all."""
    async def story(client, engine):
        tasks = await fill(client, engine, waiting=2)
        assert_busy(await client.post(COMPLETIONS, json=SHORT | body))
        assert await counts(engine) == (2, 2), "not even the two that would have had a place"
        tasks.pop().cancel()
        await until(engine, 1, 2)
        whole = post(client, body)
        await until(engine, 4, 2)
        assert_busy(await client.post(COMPLETIONS, json=SHORT))
        await finish(engine, tasks)
        await finish(engine, [whole], num_choices=3)

    serve(folder, story, limit=6)


def test_the_limit_holds_for_requests_that_come_at_one_moment(folder):
    """With a limit of 2 an idle engine takes two requests that come at the same moment, and no third."""
    async def story(client, engine):
        tasks = [post(client) for _ in range(5)]
        running = await without_refused(tasks, 3)
        assert await counts(engine) == (2, 0)
        await finish(engine, running)

    serve(folder, story, limit=2)


def test_batches_that_come_at_one_moment_do_not_tear_each_other_apart(folder):
    """Ten batches of three prompts for six places: two come in whole, and of the other eight nothing does."""
    async def story(client, engine):
        tasks = [post(client, {"prompt": [[1, 2], [3, 4], [5, 6]]}) for _ in range(10)]
        running = await without_refused(tasks, 8)
        assert await counts(engine) == (6, 0)
        await finish(engine, running, num_choices=3)

    serve(folder, story, limit=6)


def test_a_body_that_can_never_come_in_is_a_400(folder):
    """More answers than may run and wait together: coming back would not help, so the client is told to split it."""
    async def story(client, engine):
        assert "max_num_queued_reqs" in error_of(await client.post(COMPLETIONS, json=SHORT | {"n": 6}), 400)["message"]
        whole = post(client, {"n": 5})
        await until(engine, 5, 0)
        assert_busy(await client.post(COMPLETIONS, json=SHORT | {"n": 6}))
        await finish(engine, [whole], num_choices=5)

    serve(folder, story, limit=5)


def test_a_prompt_that_is_refused_gives_the_places_of_its_batch_back(folder):
    """One of four prompts does not fit: a 400, and the others' places are free again."""
    async def story(client, engine):
        bad = await client.post(COMPLETIONS, json=SHORT | {"prompt": [[1], [2], [1] * 64, [3]]})
        assert error_of(bad, 400)["param"] == "prompt"
        await until(engine, 0, 0)
        await finish(engine, [post(client, {"n": 4})], num_choices=4)

    serve(folder, story, limit=4)


def test_without_the_flag_the_queue_has_no_end(folder):
    """A hundred wait; and the offline engine queues what it likes."""
    async def story(client, engine):
        tasks = await fill(client, engine, waiting=100)
        await finish(engine, tasks)

    serve(folder, story)
    llm = make_llm(folder)
    outputs = llm.generate([[1, 2, 3]] * 20, SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    assert all(len(output.outputs[0].token_ids) == 2 for output in outputs)


def test_a_backlog_of_prompts_answers_503_until_it_is_worked_off(folder):
    """--max-num-queued-tokens counts the prompts without a token of their answer; below it all come in, whatever their length."""
    async def story(client, engine):
        tasks = [post(client, {"prompt": [1] * 9})]
        await until(engine, 1, 0)
        tasks.append(post(client, {"prompt": [1] * 30}))  # 9 are below 10
        await until(engine, 2, 0)
        error = error_of(await client.post(COMPLETIONS, json=SHORT), 503)
        assert "prefill token backlog limit" in error["message"]
        await engine.step_once()
        assert await counts(engine) == (0, 2)
        tasks.append(post(client))
        await until(engine, 1, 2)
        await finish(engine, tasks)

    serve(folder, story, max_num_queued_tokens=10)


@pytest.mark.parametrize(("reason", "options"), [("max_num_queued_reqs", {"limit": 1}),
                                                 ("max_num_queued_tokens", {"max_num_queued_tokens": 3})])
def test_every_refusal_is_counted_once_by_its_reason(folder, reason, options):
    """Refused from outside or on the engine's thread, a batch or a single one: one rejection each; a 400 is none."""
    async def story(client, engine):
        first = post(client)
        await until(engine, 1, 0)
        for body in ({}, {"prompt": [[1, 2], [3, 4]]} if reason.endswith("tokens") else {}):
            assert (await client.post(COMPLETIONS, json=SHORT | body)).status_code == 503
        assert (await client.post(COMPLETIONS, json={"prompt": "x", "zz": 1})).status_code == 400
        await finish(engine, [first])
        await engine.pause()
        burst = [post(client) for _ in range(4)]  # all pass the look from outside; the thread lets one in
        await finish(engine, await without_refused(burst, 3))
        return (await client.get("/metrics")).text

    metrics = serve(folder, story, **options)
    counted = {line.split('reason="')[1].split('"')[0]: float(line.split()[-1]) for line in metrics.splitlines()
               if line.startswith("minivllm:admission_rejections_total{")}
    assert counted == {"max_num_queued_reqs": 0, "max_num_queued_tokens": 0} | {reason: 5}


LIMIT = 1000


async def pieces(content):
    """A body without Content-Length: httpx sends it in chunks."""
    for start in range(0, len(content), 100):
        yield content[start:start + 100]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_above_the_limit_is_a_413(path, chunked):
    """Declared or found while reading: one byte too much is refused before it is parsed; at the limit and below it is read."""
    for num_bytes in (LIMIT - 1, LIMIT, LIMIT + 1):
        content = b"{" + b" " * (num_bytes - 1)  # no JSON: who parses it answers 400
        response = ask(path, content=pieces(content) if chunked else content, headers=JSON, max_request_body_bytes=LIMIT)
        if num_bytes <= LIMIT:
            assert "JSON" in str(error_of(response, 400)) or "Expecting" in str(response.json())
        else:
            error = error_of(response, 413)
            assert (error["type"], error["param"]) == ("ContentTooLargeError", "body")
            assert "1000 bytes" in error["message"]
            assert "--max-request-body-bytes" in error["message"]


def test_an_endless_body_is_read_no_further_than_the_limit():
    """The answer comes while the client still sends."""
    num_sent = 0

    async def endless():
        nonlocal num_sent
        while num_sent < 100_000:
            num_sent += 100
            yield b" " * 100

    error_of(ask(COMPLETIONS, content=endless(), headers=JSON, max_request_body_bytes=LIMIT), 413)
    assert num_sent <= LIMIT + 200


def test_a_declared_length_is_believed_before_a_byte_is_read():
    """Also one that no machine could hold; a body that fits is answered as ever, and a key is asked for first."""
    for declared in ("1001", "9" * 5000):
        error_of(ask(COMPLETIONS, content=b"{}", headers=JSON | {"content-length": declared}, max_request_body_bytes=LIMIT), 413)
    assert ask(COMPLETIONS, {"prompt": "Once"}, max_request_body_bytes=LIMIT).status_code == 200
    large = json.dumps({"prompt": "x" * LIMIT})
    assert ask(COMPLETIONS, content=large, headers=JSON, max_request_body_bytes=LIMIT, api_keys=("key",)).status_code == 401


@pytest.mark.parametrize("chat", [False, True])
def test_a_text_that_cannot_fit_is_not_tokenised(chat):
    """More characters than max_model_len tokens can have: a 400 that names the limit; at the limit it is counted in tokens.

    Of a conversation the rendered text counts, whatever it is made of.
    """
    most = 64 * MAX_CHARS_PER_TOKEN
    frame = len("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n") if chat else 0
    for num_chars in (most - 1, most, most + 1):
        engine = ScriptedEngine(max_model_len=64)
        encode, calls = engine.tokenizer.encode, []
        engine.tokenizer.encode = lambda *a, calls=calls, encode=encode, **k: calls.append(a) or encode(*a, **k)
        text = "x" * (num_chars - frame)
        body = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        error = error_of(ask(CHAT if chat else COMPLETIONS, body, engine=engine), 400)
        assert "maximum context length is 64 tokens" in error["message"]
        assert ("at least" in error["message"]) == (num_chars > most)
        assert bool(calls) <= (num_chars <= most), "the tokenizer saw a text that could not fit"


HUGE = "x" * (LONGEST_TEXT + 1)
ABSURD = {
    "cut": (COMPLETIONS, {"prompt": HUGE, "truncate_prompt_tokens": 5}, "prompt"),
    "a cut conversation": (CHAT, {"messages": [{"role": "user", "content": HUGE}], "truncate_prompt_tokens": 5}, "messages"),
    "counted": ("/tokenize", {"prompt": HUGE}, "prompt"),
    "a counted conversation": ("/tokenize", {"messages": [{"role": "user", "content": HUGE}]}, "messages"),
    "one of many": (COMPLETIONS, {"prompt": ["Once", HUGE]}, "prompt"),
    "tools": (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "tools": [{}] * 10_000, "tool_choice": "none"}, "messages"),
}


@pytest.mark.parametrize(("path", "body", "param"), ABSURD.values(), ids=ABSURD.keys())
def test_no_field_brings_an_absurd_text_to_the_tokenizer(path, body, param):
    """Not one that is cut or only counted, nor what a template makes of tools: megabytes are a 400, and quickly."""
    engine = ScriptedEngine(max_model_len=64, chat_template=CHATML.replace("[{{ tools | length }} tools]", "{{ tools }}"))
    engine.tokenizer.encode = lambda *given, **more: pytest.fail("the tokenizer saw it") if len(given[0]) > 99 else [1]
    assert error_of(ask(path, body, engine=engine), 400)["param"] == param


def test_a_long_text_may_be_counted_though_it_does_not_fit():
    """/tokenize answers for texts beyond the context."""
    assert ask("/tokenize", {"prompt": "Once " * 4000}, engine=ScriptedEngine(max_model_len=8)).json()["count"] > 4000


def test_limits_are_flags_and_mistakes_are_named(capsys):
    """No limit of the queue and 32 MiB unless said otherwise; a value that makes no sense ends with 2 and one line."""
    options = parse_args([]).server
    assert (options.max_num_queued_reqs, options.max_request_body_bytes) == (None, 32 * 2**20)
    options = parse_args(["--max-num-queued-reqs", "1", "--max_request_body_bytes=5", "--max-num-queued-tokens", "9"]).server
    assert (options.max_num_queued_reqs, options.max_request_body_bytes, options.max_num_queued_tokens) == (1, 5, 9)
    for flag, value in (("--max-num-queued-reqs", "-1"), ("--max-request-body-bytes", "0"), ("--max-num-queued-tokens", "0")):
        with pytest.raises(SystemExit) as exit_info:
            parse_args([flag, value])
        assert exit_info.value.code == 2
        assert f"{flag}: must be" in capsys.readouterr().err


@pytest.mark.parametrize(("limits", "wanted"), [((1024, 2**20), (65536, 2**20)), ((1024, 4096), (4096, 4096)),
                                                ((1024, -1), (65536, -1)), ((100_000, 2**20), None), ((-1, -1), None)])
def test_the_server_raises_its_own_limit_of_open_files(monkeypatch, limits, wanted):
    """To 65,536 or the hard limit, never down; and a system that refuses does not keep the server from starting."""
    resource = pytest.importorskip("resource")
    given = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: given.append(new))
    _raise_file_limit()
    assert given == ([] if wanted is None else [wanted])

    def refuse(which, new):
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    _raise_file_limit()


def test_a_limit_of_the_engine_speaks_of_chats_own_field(folder):
    """More logprobs than the engine gives: completions call the field `logprobs`, and chats `top_logprobs`."""
    async def story(client, engine):
        whole = error_of(await client.post(COMPLETIONS, json=SHORT | {"logprobs": 21}), 400)
        chat = error_of(await client.post(CHAT, json={"messages": HI, "logprobs": True, "top_logprobs": 21}), 400)
        assert (whole["param"], chat["param"]) == ("logprobs", "top_logprobs")
        assert chat["message"].startswith("top_logprobs=21 asks for more than the 20 logprobs"), chat["message"]

    serve(folder, story)
