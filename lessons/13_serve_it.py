# %% [markdown]
# # Lesson 13. Serve it
#
# > **The one idea.** The engine is a queue: requests go in between two steps, tokens come out after each. HTTP is a thin
# > skin around it, and whoever holds a connection can let go at any time.
#
# So far a program had a list of prompts and waited. A server has clients: they come when they like, read as fast as they
# like, and leave without a word. This lesson puts the engine on a thread of its own and counts what clients get. It
# counts in steps: clocks are in `docs/ledger.md`.

# %%
import json

from minivllm import viz
from minivllm.async_engine import AsyncEngine, RequestStream
from minivllm.course_clients import ask_over_http, leave_at_random, read_every, serve_clients
from minivllm.coursework import course_workload, embedded_tokenizer
from minivllm.detokenizer import IncrementalDetokenizer, TextStream, find_stop, num_held_back
from minivllm.sampling_params import SamplingParams
from minivllm.tiny import draft_path
from minivllm.viz import show

# %% [markdown]
# ## What hurts
#
# A token is bytes and not characters. A text that is decoded token by token, as one would write it first, has holes: a
# character whose bytes lie in several tokens comes out as several question marks.

# %%
tokenizer = embedded_tokenizer()
text = "Hi 👋, 你好, здравствуй!"
token_ids = tokenizer.encode(text)
one_by_one = "".join(tokenizer.decode([token_id]) for token_id in token_ids)
print(f"{len(token_ids)} tokens: {one_by_one}")

# %% [markdown]
# ## The code: text
#
# The incremental decoder waits for the rest of a character. It gives text late, but never wrong and never twice.
#
# To write them before you read them: `python -m minivllm.learn start 13b` now, then 13a, and come back.

# %%
show(TextStream.push)

# %%
stream = TextStream(tokenizer, skip_special_tokens=True)
pieces = [stream.push(token_id) for token_id in token_ids] + [stream.flush()]
print(pieces)
assert "".join(pieces) == text, "what was streamed is the whole text"
assert (one_by_one.count("\ufffd"), "".join(pieces).count("\ufffd")) == (17, 0), "broken characters"

# %% [markdown]
# Stop strings need the same care, because they may begin in one token and end in a later one. What could still become a
# stop string is held back, and no more than that.

# %%
show(num_held_back)

# %%
show(find_stop)

# %%
detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(stop=["</end>"]))
shown = []
for token_id in tokenizer.encode("a < b.</b></end> and more"):
    stop = detokenizer.update([token_id], stop_terminated=False)
    shown.append(detokenizer.text)
    if stop:
        break
print(shown)
assert stop == "</end>" and shown[-1] == "a < b.</b>"

# %% [markdown]
# ## The code: a thread and a queue
#
# One thread owns the engine. Nobody else touches it, so it needs no lock. Whoever wants something puts a command into a
# queue, and the thread runs what is there between two steps.

# %%
show(AsyncEngine._run)

# %% [markdown]
# Outputs go the other way: one wake-up of the event loop for each step, however many requests moved. Each request has a
# stream, which keeps the newest output and nothing else. Outputs are cumulative, so nothing is missed.

# %%
show(RequestStream.put)

# %% [markdown]
# HTTP adds JSON and a connection. This is the server's own application, called without a port.

# %%
body = {"prompt": "The block pool", "max_tokens": 8, "temperature": 0, "stream": True}
*events, last = ask_over_http("/v1/completions", body, num_blocks=65, max_model_len=256)
choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
print("".join(choice["text"] for choice in choices), "...", choices[-1]["finish_reason"], "...", last)

# %% [markdown]
# ## The course's workload, asked by clients
#
# The 64 requests are shared out to some number of clients. Each client asks, reads its answer to the end, and asks
# again. The engine has 16 seats (`max_num_seqs`) and is held between two steps, so that the order of things is the same
# in every run.

# %%
workload = course_workload()
engine_args = {"model": str(draft_path()), "num_blocks": 257, "block_size": 16, "max_model_len": 512}
engine_args |= {"max_num_batched_tokens": 256, "enable_prefix_caching": False}
numbers = (2, 4, 8, 16, 32, 64)
served = {n: serve_clients(workload, n, max_num_seqs=16, **engine_args) for n in numbers}
for n, one in served.items():
    first = sum(one.first_token.values()) / len(one.first_token)
    print(
        f"{n:2} clients: {len(one.running):5,} steps, {one.tokens_per_step:5.2f} tokens a step, "
        f"first token after {first:4.1f} steps, at worst {max(one.first_token.values())}"
    )

# %% [markdown]
# More clients fill the steps until the seats are taken. From there on a client more gives nobody a token more.

# %%
viz.line(
    {"16 seats": [(n, one.tokens_per_step) for n, one in served.items()]},
    "clients",
    "tokens a step",
    "64 requests shared out to clients: throughput",
)

# %% [markdown]
# What it gives is a wait. A server that has no limit on its queue answers everybody in the end, and nobody soon.

# %%
waits = {n: list(one.first_token.values()) for n, one in served.items()}
viz.line(
    {
        "mean": [(n, sum(steps) / len(steps)) for n, steps in waits.items()],
        "worst": [(n, max(steps)) for n, steps in waits.items()],
    },
    "clients",
    "steps from the question to its first token",
    "64 requests shared out to clients: waiting for the first token",
)

# %%
queue = list(zip(served[64].running, served[64].waiting))
viz.steps(queue, ["running", "waiting"], None, "64 clients, 16 seats: requests after each step")

# %%
assert [len(served[n].running) for n in (2, 16, 64)] == [1685, 309, 309], "steps"
assert [max(waits[n]) for n in (2, 16, 64)] == [1, 6, 170], "steps to the first token, at worst"

# %% [markdown]
# ## Clients that leave
#
# Before every step each client leaves with a probability of 4 %: in the queue, in the middle of a prompt, in the middle
# of an answer. The server notices a closed connection and closes the stream, and closing is all there is to it.

# %%
show(RequestStream.close)

# %%
show(AsyncEngine._abandon)

# %%
departures, num_read, num_missing = [], 0, 0
for seed in range(5):
    left, read, missing = leave_at_random(workload, seed, max_num_seqs=32, **engine_args)
    departures, num_read, num_missing = departures + left, num_read + read, num_missing + missing
running = [one for one in departures if one.was_running]
print(
    f"{len(departures)} clients left, {len(running)} of them while their request ran; {num_read} stayed"
)
print(f"their requests held {sum(one.held_before for one in departures)} blocks")

# %% [markdown]
# ## The number

# %%
late = [one for one in departures if one.held_after or one.num_steps]
print(f"{len(late)} came back late, {num_missing} blocks are missing")
assert (len(late), num_missing) == (0, 0), "every block is back before the next step"
assert (len(departures), sum(one.held_before for one in departures)) == (267, 1119)

# %% [markdown]
# **0 blocks leaked over 267 disconnects, each of them back before the next step.**
#
# ## What it costs
#
# A reader that does not keep up is the other side of this. It must hold up neither the engine nor the memory. This one
# looks in after every 7 steps: it is handed all tokens so far, once, and what lay between was never kept.

# %%
known = read_every(workload.requests[0], 7, **engine_args)
print(f"{workload.requests[0].max_tokens} tokens in {len(known)} readings: {known}")
assert known[-1] == workload.requests[0].max_tokens and len(known) == -(-known[-1] // 7)

# %% [markdown]
# The price of the thread is Python's: event loop and engine share one interpreter, so JSON for 64 streams takes time
# from the steps. The ledger has measured how much. vLLM pays with a process of its own for the engine, and with
# messages between the two.
#
# ## Your turn
#
# ```bash
# python -m minivllm.learn start 13a    # stop strings
# python -m minivllm.learn start 13b    # half characters
# python -m minivllm.learn start 13c    # leaving, in any state
# MINIVLLM_MINE=$PWD/mine python -m minivllm.serve     # a server on your code
# ```
#
# About 60 minutes for the three.
#
# ## Questions
#
# 1. A step is being computed when a client leaves. When are its blocks free, and what happens to the token that comes?
# 2. With 64 clients and 16 seats the worst wait is 170 steps. Which limit of a server would turn it into an error?
#    (`docs/operations.md` has its name.) Who is better off?
# 3. Why is the stop string looked for in the text and not in the token ids?
#
# ## In vLLM
#
# `vllm/v1/engine/async_llm.py` and `core_client.py`: the same queue between two processes, with msgpack and ZMQ.
# `vllm/v1/engine/detokenizer.py` uses the same incremental decoder, and holds back as many characters as the longest
# stop string has, less one.
