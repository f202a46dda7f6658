"""The course's one workload, and the runs that lessons count: the same 64 requests from the first lesson to the last.

Owns what a lesson would otherwise repeat: the requests, a model for counting, and the ways to watch a run. Computes nothing
that the package computes elsewhere. Counters of these runs do not depend on the weights: every answer has its full length.

    workload = course_workload()                   64 prompts and the number of tokens that each one asks for
    run = run_engine(workload, num_blocks=257)     the real engine, with a trace: run.stats, run.states, run.token_ids
    run = run_engine(taught_workload(), ...)       the same for questions that the embedded model knows; guesses(run): its drafts
    passes = watch(model)                          the positions of every pass of a naive loop
    seats = seat_rows(workload, num_rows=8)        who sits in which dense row, step by step
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from minivllm.bench.workload import BenchRequest, Workload
from minivllm.config import ModelConfig
from minivllm.llm import LLM
from minivllm.model import NoCache, Qwen2ForCausalLM
from minivllm.sampling_params import SamplingParams
from minivllm.scheduler_output import SchedulerStats
from minivllm.slot_batching import SlotRequest, SlotScheduler
from minivllm.tiny import draft_path
from minivllm.trace import Record, TraceState, replay
from minivllm.weights import load_dummy_model, load_model, resolve_model

NUM_REQUESTS, MEAN_PROMPT, MEAN_OUTPUT, MAX_OUTPUT, SPREAD = 64, 72, 60, 256, 0.8
Bar = tuple[int, int, int | None, str]  # of `viz.timeline`: start, end, color, label
TAUGHT = ("What is a block?", "What is a KV cache?", "How does speculative decoding work?", "What is the scheduler?",
          "tell me a story about a fox", "tell me a story about a robot", "What is 17 + 25?", "What is the capital of France?")
FIRST_ID, LAST_ID = 256, 4000  # ordinary tokens of the embedded vocabulary: no bytes, no special ones


def course_workload(num_requests: int = NUM_REQUESTS, seed: int = 0, part: slice = slice(None)) -> Workload:
    """Many short requests and a few long ones, as servers see them: both lengths are lognormal, answers at most 256.

    The first ones of a longer workload are those of a shorter one; `part` keeps some of them.
    """
    rng = random.Random(seed)

    def length(mean: int) -> int:
        return max(1, round(rng.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD)))  # the mean of exp is shifted

    lengths = [(length(MEAN_PROMPT), min(MAX_OUTPUT, length(MEAN_OUTPUT))) for _ in range(num_requests)]
    tokens = random.Random(f"{seed}/tokens")
    requests = [BenchRequest([tokens.randint(FIRST_ID, LAST_ID) for _ in range(prompt)], output) for prompt, output in lengths]
    return Workload(f"course: {num_requests} requests, seed {seed}", requests[part], temperature=0.0)


def taught_workload(temperature: float = 0.0, max_tokens: int = 60) -> Workload:
    """Eight questions of which the embedded model has learned the answers, in its chat form: answers end where it ends them."""
    tokenizer = embedded_tokenizer()
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
               for text in TAUGHT]
    requests = [BenchRequest(list(prompt), max_tokens) for prompt in prompts]
    return Workload(f"course: {len(TAUGHT)} questions", requests, temperature)


def embedded_model() -> Qwen2ForCausalLM:
    """The checkpoint inside the package, in float32: 5.6 million numbers that learned to talk about this engine."""
    return load_model(resolve_model(), "float32")


def embedded_draft() -> Qwen2ForCausalLM:
    """The smaller checkpoint beside it, with the same vocabulary: it guesses, and the other one checks."""
    return load_model(draft_path(), "float32")


def embedded_tokenizer() -> Any:
    """The tokenizer beside it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_model())


def counting_model() -> Qwen2ForCausalLM:
    """One layer of random numbers, for loops whose work is counted and not read: no count depends on the model's size."""
    config = ModelConfig(vocab_size=4096, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-6, rope_theta=10_000.0,
                         max_position_embeddings=2048, tie_word_embeddings=True)
    return load_dummy_model(config, "float32")


@contextmanager
def watch(model: Qwen2ForCausalLM) -> Iterator[list[list[int]]]:
    """A list that gets, for every pass over the model, the positions that it computes. Padding has negative ones."""
    passes: list[list[int]] = []
    handle = model.register_forward_pre_hook(lambda _, args: passes.append(args[1].flatten().tolist()))
    try:
        yield passes
    finally:
        handle.remove()


@torch.inference_mode()
def next_token_logits(model: Qwen2ForCausalLM, token_ids: list[int], num_last: int = 1) -> torch.Tensor:
    """The logits (num_last, V) behind each of the last so many of these tokens: of the token after all of them, by default."""
    ids = torch.tensor(token_ids)
    hidden = model(ids, torch.arange(len(ids)), [NoCache() for _ in model.model.layers], SimpleNamespace(slot_mapping=None))
    return model.compute_logits(hidden[-num_last:])


@torch.inference_mode()
def shapes_of(model: Qwen2ForCausalLM, token_ids: list[int]) -> list[tuple[str, str]]:
    """Run the tokens through the model: the name of each module up to the end of the first layer, and what came out of it."""
    shapes: list[tuple[str, str]] = []
    handles = [module.register_forward_hook(lambda _, args, output, name=name: shapes.append((name, str(tuple(output.shape)))))
               for name, module in model.named_modules()
               if "layers.0" in name or name in ("model.embed_tokens", "model.norm", "lm_head")]
    next_token_logits(model, token_ids)
    for handle in handles:
        handle.remove()
    return shapes


def seat_rows(workload: Workload, num_rows: int) -> list[dict[int, tuple[int, int]]]:
    """Lesson 6's scheduler with a model that takes no time. For every step: row -> (request, KV slots that hold its tokens)."""
    requests = [SlotRequest(request.prompt_token_ids, request.max_tokens) for request in workload.requests]
    index = {id(request): number for number, request in enumerate(requests)}
    scheduler, steps = SlotScheduler(requests, num_rows), list[dict[int, tuple[int, int]]]()
    while True:
        scheduler.schedule()
        if not scheduler.running:
            return steps
        steps.append({row: (index[id(request)], request.num_tokens) for row, request in scheduler.running.items()})
        for request in scheduler.running.values():
            request.output.append(0)


def row_timeline(batches: list[list[dict[int, tuple[int, int]]]], num_rows: int) -> list[tuple[str, list[Bar]]]:
    """The rows of batches that run one after the other, for `viz.timeline`: who sits where, and gray where nobody does."""
    rows: list[list[Bar]] = [[] for _ in range(num_rows)]
    begin, num_before = 0, 0
    for seats in batches:
        requests = {request for step in seats for request, _ in step.values()}
        for row, bars in enumerate(rows):
            for step, taken in enumerate(seats, begin):
                who = num_before + taken[row][0] if row in taken else None
                if bars and bars[-1][2] == who:
                    bars[-1] = (bars[-1][0], step + 1, who, bars[-1][3])
                else:
                    bars.append((step, step + 1, who, "" if who is None else str(who)))
        begin, num_before = begin + len(seats), num_before + len(requests)
    return [(f"row {row}", bars) for row, bars in enumerate(rows)]


@dataclass
class Run:
    """What the engine did: its counters, its trace, the state after every step, and each request's new tokens, in order."""

    stats: SchedulerStats
    records: list[Record]
    states: list[TraceState]
    token_ids: list[list[int]]

    @property
    def most_at_once(self) -> int:
        """The most requests that were in memory after one step."""
        return max(len(state.requests) for state in self.states)

    def slots(self) -> list[tuple[int, int]]:
        """After every step: KV slots that hold a token, and slots in blocks that somebody owns."""
        return [(sum(request["num_computed_tokens"] for request in state.requests.values()),
                 sum(len(request["blocks"]) for request in state.requests.values()) * state.block_size)
                for state in self.states]

    def work(self) -> list[tuple[int, int, int]]:
        """What every step computes: new tokens of answers, prompt tokens, and positions that were computed before."""
        steps, prompt, computed, most = [], dict[str, int](), dict[str, int](), dict[str, int]()
        for record in (record for record in self.records if record["type"] == "step"):
            for name, entry in record["admitted"].items():
                prompt.setdefault(name, entry["num_prompt_tokens"])
                computed[name] = entry["num_computed_tokens"]
            counts = [0, 0, 0]
            for name, count in record["scheduled"].items():
                for position in range(computed[name], computed[name] + count):
                    counts[2 if position < most.get(name, 0) else position < prompt[name]] += 1
                computed[name] += count
                most[name] = max(most.get(name, 0), computed[name])
            steps.append((counts[0], counts[1], counts[2]))
        return steps


def run_engine(workload: Workload, ignore_eos: bool = True, **engine_args: Any) -> Run:
    """Answer the whole workload with `LLM(**engine_args)` and record every step. An end-of-sequence token ends nothing, unless
    `ignore_eos` is False. Request i has the seed i.
    """
    return _record([(0, request) for request in workload.requests], workload.temperature, engine_args, ignore_eos)


def guesses(run: Run) -> list[tuple[str, list[tuple[int, int, int]]]]:
    """For each request, what each step of the run brought it: drafts that were accepted, tokens of the model's own, and drafts
    that were computed for nothing. Three zeros where it has no part in the step.
    """
    rows, steps = [], [record for record in run.records if record["type"] == "step"]
    for name in map(str, range(len(run.token_ids))):
        row = []
        for record in steps:
            drafts, said = record["drafts"].get(name, []), record["sampled"].get(name, [])
            pairs = enumerate(zip(drafts, said))
            accepted = next((index for index, (draft, token_id) in pairs if draft != token_id), min(len(drafts), len(said)))
            row.append((accepted, len(said) - accepted, len(drafts) - accepted))
        rows.append((name, row))
    return rows


def answers_then_prompt(num_streams: int, prompt_len: int, after: int, **engine_args: Any) -> Run:
    """Short prompts with answers of 64 tokens, and one long prompt that arrives `after` so many steps."""
    rng = random.Random(0)
    lengths = [(0, 16, 64)] * num_streams + [(after, prompt_len, 8)]
    arrivals = [(step, BenchRequest([rng.randint(FIRST_ID, LAST_ID) for _ in range(length)], output))
                for step, length, output in lengths]
    return _record(arrivals, 0.0, {"block_size": 16, "num_blocks": 257, "enable_prefix_caching": False} | engine_args)


def _record(arrivals: list[tuple[int, BenchRequest]], temperature: float, engine_args: dict[str, Any],
            ignore_eos: bool = True) -> Run:
    """Add each request after the step that it names, run to the end, and keep all that the trace tells."""
    records: list[Record] = []
    answers: dict[str, list[int]] = {str(number): [] for number in range(len(arrivals))}
    with LLM(**{"dtype": "float32", "device": "cpu"} | engine_args) as llm:
        llm.engine.trace.subscribe(records.append)
        queue, num_steps = list(enumerate(arrivals)), 0
        while queue or llm.engine.has_unfinished_requests():
            while queue and queue[0][1][0] <= num_steps:
                number, (_, request) = queue.pop(0)
                params = SamplingParams(temperature=temperature, max_tokens=request.max_tokens, ignore_eos=ignore_eos, seed=number)
                llm.engine.add_request(str(number), request.prompt_token_ids, params)
            for output in llm.engine.step():
                answers[output.request_id] = list(output.outputs[0].token_ids)
            num_steps += 1
        states = [replace(state, requests=deepcopy(state.requests), cached=set(state.cached)) for state in replay(records)]
        return Run(llm.stats, records, states, list(answers.values()))
