"""The engine behind its thread: streams, cancellation, pausing, failure, and an end that leaves nothing behind."""

from __future__ import annotations

import asyncio
import threading

import pytest
from test_engine import greedy, make_llm, prompts_of, run_alone

from minivllm.async_engine import AsyncEngine
from minivllm.exceptions import EngineDeadError, ValidationError


def run(story, **knobs):
    """Run one coroutine function on a fresh engine, and check that its thread ends."""
    async def main():
        engine = AsyncEngine(make_llm(**knobs).engine)
        try:
            return await asyncio.wait_for(story(engine), 60)
        finally:
            engine.shutdown()

    result = asyncio.run(main())
    assert not any(thread.name == "minivllm-engine" for thread in threading.enumerate()), "the engine's thread has ended"
    return result


async def usage(engine: AsyncEngine) -> float:
    return await engine.call(lambda inner: inner.kv_cache_manager.usage)


async def last_of(stream) -> list[int]:
    outputs = [output async for output in stream]
    return outputs[-1].outputs[0].token_ids


def test_concurrent_streams_equal_running_alone():
    """Twenty requests at once through the thread give the tokens that each gives alone."""
    prompts, params = prompts_of(*range(3, 23)), [greedy(9)] * 20

    async def story(engine):
        streams = [await engine.add_request(prompt, one, str(i)) for i, (prompt, one) in enumerate(zip(prompts, params))]
        return await asyncio.gather(*(last_of(stream) for stream in streams))

    assert run(story) == run_alone(prompts, params)


def test_outputs_are_cumulative_so_a_slow_reader_misses_nothing():
    """A reader that sleeps while the engine runs is handed the newest output, which holds everything before it."""
    async def story(engine):
        stream = await engine.add_request(prompts_of(4)[0], greedy(30), "slow")
        await asyncio.sleep(0.5)
        outputs = [output async for output in stream]
        return len(outputs), len(outputs[-1].outputs[0].token_ids)

    num_outputs, num_tokens = run(story)
    assert num_tokens == 30
    assert num_outputs < 30, "outputs that piled up are handed over as one"


def test_who_waits_for_the_end_is_handed_one_output():
    """With `final_only` a stream has one output, the last of those that it would have had: also when somebody aborts it."""
    prompt, params = prompts_of(5)[0], greedy(9)

    async def story(engine):
        every = [output async for output in await engine.add_request(prompt, params, "every")]
        last = [output async for output in await engine.add_request(prompt, params, "last", final_only=True)]
        await engine.pause()
        long = await engine.add_request(prompt, greedy(50), "long", final_only=True)
        for _ in range(3):
            await engine.step_once()
        await engine.abort("long")
        aborted = [output async for output in long]
        return every, last, aborted, await usage(engine)

    every, last, aborted, in_use = run(story)
    assert len(every) > 1 and len(last) == 1, f"{len(every)} outputs, and {len(last)} for who waits for the end"
    assert last[0].outputs == every[-1].outputs and last[0].finished
    assert [(one.finish_reason, len(one.token_ids)) for output in aborted for one in output.outputs] == [("abort", 3)]
    assert in_use == 0


def test_bad_input_is_refused_before_anything_is_streamed():
    """`add_request` itself raises, and the next request is served."""
    async def story(engine):
        with pytest.raises(ValidationError, match="cannot be empty"):
            await engine.add_request([], greedy(), "bad")
        await engine.pause()  # or the first one may have ended before its id comes again
        first = await engine.add_request([1, 2], greedy(3), "same id")
        with pytest.raises(ValidationError, match="in use"):
            await engine.add_request([1, 2], greedy(3), "same id")
        await engine.resume()
        return await last_of(first)

    assert len(run(story)) == 3


def test_t48_leaving_a_stream_frees_its_blocks_within_one_step():
    """Closing, breaking out of the loop and cancelling the task all abort the request."""
    async def story(engine):
        closed = await engine.add_request(prompts_of(9)[0], greedy(50), "closed")
        await closed.__anext__()
        closed.close()

        async def read_forever():
            async for _ in engine.generate(prompts_of(9)[0], greedy(50), "cancelled"):
                pass

        await engine.pause()
        task = asyncio.create_task(read_forever())
        await asyncio.sleep(0.05)  # its request is in by now
        await engine.step_once()
        assert await usage(engine) > 0, "the request that is about to be cancelled holds blocks"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        return await usage(engine), await engine.call(lambda inner: inner.has_unfinished_requests())

    assert run(story) == (0, False), "nothing is left of requests whose readers have gone"


def test_abort_ends_a_stream_with_what_there_is():
    """A request aborted by another caller gets a last output with finish_reason abort."""
    async def story(engine):
        stream = await engine.add_request(prompts_of(5)[0], greedy(50), "r")
        await stream.__anext__()
        await engine.abort("r")
        return [output async for output in stream][-1]

    output = run(story)
    assert output.finished
    assert output.outputs[0].finish_reason == "abort"


def test_a_paused_engine_moves_only_when_stepped():
    """While paused, requests come in and nothing moves; each single step makes one step; resume lets it run."""
    async def story(engine):
        await engine.pause()
        stream = await engine.add_request(prompts_of(5)[0], greedy(6), "r")
        counts = []
        for _ in range(3):
            await asyncio.sleep(0.02)
            counts.append(await engine.call(lambda inner: inner.stats.num_steps))
            await engine.step_once()
        counts.append(await engine.call(lambda inner: inner.stats.num_steps))
        await engine.resume()
        tokens = await last_of(stream)
        await engine.pause()
        await engine.step_once()  # nothing to do: returns at once
        return counts, len(tokens)

    assert run(story) == ([0, 1, 2, 3], 6)


def test_an_engine_failure_reaches_every_reader_and_every_later_caller(caplog):
    """When a step fails, streams end with EngineDeadError, `errored` is true, and a new request is refused at once."""
    async def story(engine):
        await engine.pause()
        streams = [await engine.add_request(prompt, greedy(5), str(i)) for i, prompt in enumerate(prompts_of(5, 6))]

        def fail(output):
            raise RuntimeError("CUDA error: the device is gone")

        await engine.call(lambda inner: setattr(inner.runner, "execute_model", fail))
        await engine.resume()
        for stream in streams:
            with pytest.raises(EngineDeadError, match="the device is gone"):
                await last_of(stream)
        with pytest.raises(EngineDeadError):
            await engine.add_request([1], greedy(1), "late")
        return engine.errored

    assert run(story) is True


def test_shutdown_with_requests_in_flight_ends_their_streams():
    """Shutting down aborts what runs: no reader waits forever."""
    async def story(engine):
        streams = [await engine.add_request(prompt, greedy(50), str(i)) for i, prompt in enumerate(prompts_of(5, 6))]
        engine.shutdown()
        outputs = []
        for stream in streams:
            outputs.append([output async for output in stream][-1])
        return [output.outputs[0].finish_reason for output in outputs]

    assert run(story) == ["abort", "abort"]
