"""Lesson 14, the part without a GPU: steps with prompts, padded to a bucket, say what the readable rung says, whoever decodes
beside.

Graphs themselves: test_gpu_graphs.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from depth import examples
from flex_double import flex_on_cpu  # noqa: F401 - a fixture
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import greedy, make_llm, prompts_of, tokens_of

from minivllm import cuda_graphs, input_batch, model_runner, prompt_graphs, step_sampler
from minivllm.attention import allocate_kv_cache
from minivllm.config import ModelConfig
from minivllm.cuda_graphs import ZERO_BUCKETS
from minivllm.flex_attention import QUERY_TILE, FlexPagedAttention
from minivllm.input_batch import RowTensors, StepInputs
from minivllm.prompt_graphs import HOST_BOUND_FLOPS, MOST_PROMPTS, TOKEN_BUCKETS, PromptGraphs, token_buckets

MAX_NUM_SEQS, MAX_MODEL_LEN, BLOCK_SIZE = 200, 256, 16
SHAPE = ModelConfig(vocab_size=7, hidden_size=28, intermediate_size=8, num_hidden_layers=1, num_attention_heads=14,
                    num_key_value_heads=2, head_dim=2, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=MAX_MODEL_LEN,
                    tie_word_embeddings=True)


def step_of(decodes: list[int], prompts: list[tuple[int, int]]) -> StepInputs:
    """A step of decodes at these positions and of chunks (tokens, computed before them), each in a row of its own."""
    query_lens = np.array([1] * len(decodes) + [count for count, _ in prompts], dtype=np.int64)
    computed = np.array(decodes + [before for _, before in prompts], dtype=np.int64)
    rows = np.arange(len(query_lens))[::-1].copy()
    positions = np.concatenate([np.arange(start, start + count) for start, count in zip(computed, query_lens)])
    return StepInputs(rows, query_lens, computed + query_lens, rows.repeat(query_lens), positions, len(decodes),
                      np.ones(len(rows), dtype=bool), np.zeros(len(rows), dtype=np.int64))


def graphs_of(forward, buckets: list[int], max_num_seqs: int = MAX_NUM_SEQS) -> PromptGraphs:
    rows = RowTensors(max_num_seqs, MAX_MODEL_LEN, 10, BLOCK_SIZE, torch.device("cpu"))
    rows.token_ids[:] = torch.arange(max_num_seqs + 1)[:, None] * 1000 + torch.arange(MAX_MODEL_LEN)  # who and where
    cache = FlexPagedAttention(allocate_kv_cache(1, 10, BLOCK_SIZE, 2, 2, torch.float32, torch.device("cpu"))[0], BLOCK_SIZE)
    return PromptGraphs(forward, [cache], rows, SHAPE, buckets, torch.zeros(max_num_seqs), use_graphs=False)


steps = st.tuples(st.lists(st.integers(0, 200), max_size=150),
                  st.lists(st.tuples(st.integers(2, 150), st.integers(0, 100)), min_size=0, max_size=6)).filter(any)


@settings(max_examples=examples(60))
@given(steps)
def test_every_token_is_asked_for_where_its_answer_stands(drawn):
    """A decode stands in the decodes' part with its own row and position, a prompt's token in a tile of its own request."""
    step = step_of(*drawn)
    seen = []
    graphs = graphs_of(lambda ids, positions, caches, metadata: (seen.append((ids, positions, metadata)), ids)[1],
                       token_buckets(4096, 1))
    size, total, count = graphs.bucket_for(step), len(step.positions), step.num_decodes
    assert size is not None and size >= total
    assert torch.equal(graphs.run(step, size), torch.from_numpy(step.token_rows * 1000 + step.positions).int())
    ((ids, positions, metadata),) = seen
    assert (ids[total:] == MAX_NUM_SEQS * 1000).all() and (positions[total:] == 0).all(), "padding is nobody's"
    most, places = metadata.num_decodes, metadata.places[:total]
    assert places[:count].tolist() == list(range(count)) and count <= most <= size
    in_tiles = places[count:] - most
    assert (in_tiles >= 0).all(), "a prompt's token takes the answer of a decode"
    assert metadata.prefill.tile_rows[in_tiles].tolist() == list(range(count, total)), "a token is not in its tile"
    filled = metadata.decode.block_mask.kv_num_blocks.flatten()
    expected = [position // BLOCK_SIZE + 1 for position in step.positions[:count]] + [1] * (most - count)
    assert filled.tolist() == expected, "decodes see their blocks, and those behind them one null block"


@pytest.mark.parametrize("max_num_seqs", [1, 3, 20, 64, 100, 256, 1000])
def test_t32_any_step_of_few_tokens_has_a_graph(max_num_seqs):
    """Whatever part of a step decodes, up to max_num_seqs: some bucket has room while tokens and prompts are few enough."""
    graphs = graphs_of(lambda ids, *_: ids, list(TOKEN_BUCKETS), max_num_seqs)
    for num_decodes in {0, 1, max_num_seqs // 2, max_num_seqs - 1}:
        for num_prompts in {1, min(MOST_PROMPTS, max_num_seqs - num_decodes)}:
            step = step_of([5] * num_decodes, [(2, 0)] * num_prompts)
            size = graphs.bucket_for(step)
            assert size is not None, f"no graph for {num_decodes} decodes and {num_prompts} prompts"
            assert graphs.pack(size, step).shape == graphs.inputs[size].shape
            assert size - len(step.positions) <= max(31, size // 3), f"{size} rows for {len(step.positions)} tokens"
    assert graphs.bucket_for(step_of([5] * 33, [(255, 0)] * MOST_PROMPTS)) is None, "more tokens than the largest graph has"


def test_many_prompts_have_a_graph_with_tiles_for_all():
    """64 users who share a prefix of 2,048 tokens, with 64 of their own, are one step by graph; so is anything up to 85 prompts."""
    graphs = graphs_of(lambda ids, *_: ids, list(TOKEN_BUCKETS), 256)
    assert graphs.bucket_for(step_of([], [(2112, 0)] + [(64, 2048)] * 63)) == 6144
    for num_prompts in range(MOST_PROMPTS + 1, 86):
        size = graphs.bucket_for(step_of([], [(2, 0)] * num_prompts))
        assert size is not None and size // 96 >= num_prompts, f"{num_prompts} prompts in a graph of {size} tokens"
        smaller = max(bucket for bucket in TOKEN_BUCKETS if bucket < size)
        assert smaller // 96 < num_prompts, f"{num_prompts} prompts fit into {smaller} tokens, and go into {size}"
    assert graphs.bucket_for(step_of([], [(2, 0)] * 86)) is None, "more prompts than there are tiles for"


@pytest.mark.parametrize("budget", [1, 31, 32, 60, 300, 2048, 4000, 8192])
def test_no_graph_is_larger_than_a_step_or_slower_than_its_host(budget):
    """Buckets ascend within the budget, which is the last where it is small; and a large model has few."""
    for num_parameters in (10**6, 494_000_000, 7_600_000_000, 10**12):
        buckets = token_buckets(budget, num_parameters)
        assert buckets == sorted(set(buckets)) and all(size <= budget for size in buckets)
        assert all(2 * size * num_parameters <= 2 * HOST_BOUND_FLOPS for size in buckets), "the GPU would be the slower one"
        if budget <= TOKEN_BUCKETS[-1] and budget * num_parameters <= HOST_BOUND_FLOPS:
            assert buckets[-1] == budget, "steps that fill a small budget have a graph"
    assert token_buckets(8192, 7_600_000_000)[-1] == 512 and token_buckets(8192, 494_000_000)[-1] == TOKEN_BUCKETS[-1]


def test_a_full_batch_of_prompts_fits_its_tiles():
    """As many prompts as a step may have, each one token longer than its tiles: every bucket has tiles enough."""
    graphs = graphs_of(lambda ids, *_: ids, list(TOKEN_BUCKETS))
    for size in TOKEN_BUCKETS:
        most = max(MOST_PROMPTS, size // 96)
        each = size // most
        for count in {max(2, each), max(2, each // QUERY_TILE * QUERY_TILE + 1)}:
            num_prompts = min(most, size // count)
            graphs.pack(size, step_of([], [(count, 0)] * num_prompts))  # raises if an array is too short


def test_a_request_that_joins_a_large_batch_has_a_graph(flex_on_cpu):  # noqa: F811
    """Beside more decodes than a graph has prompts, prompts still go by graph, and all tokens are the readable rung's."""
    prompts = prompts_of(*[5] * 40, *[9, 23, 40, 3, 17] * 4)
    params = [greedy(24)] * 40 + [greedy(4)] * 20
    knobs = {"num_blocks": 300, "max_num_seqs": 44, "max_num_batched_tokens": 60, "max_model_len": 64, "block_size": 16}
    outputs, joined = [], []
    for backend in ("flex_attention", "paged_gather"):
        llm = make_llm(attention_backend=backend, **knobs)
        if graphs := llm.engine.runner.prompt_graphs:
            own = graphs.run
            graphs.run = lambda inputs, size, own=own: (joined.append((inputs.num_decodes, len(inputs.rows))), own(inputs, size))[1]
        outputs.append(tokens_of(llm.generate(prompts, params, use_tqdm=False)))
        llm.close()
    assert outputs[0] == outputs[1]
    large = [step for step in joined if step[0] > MOST_PROMPTS and step[1] > step[0]]
    assert len(large) > 5, f"steps by graph, decodes and requests: {joined}"


def test_what_the_host_sends_in_a_step(flex_on_cpu, monkeypatch):  # noqa: F811
    """A step with prompts: what is new in the rows, the graph's integers, whose tokens these are. A decode: nothing, or one thing
    where somebody gets a block. The GPU waits for each of them.
    """
    sent: list[str] = []
    for module in (input_batch, cuda_graphs, prompt_graphs, model_runner, step_sampler):
        for name in {"upload", "upload_into"} & set(vars(module)):
            own = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *args, own=own, module=module: (
                sent.append(module.__name__.removeprefix("minivllm.")), own(*args))[1])
    llm = make_llm(attention_backend="flex_attention", num_blocks=40, max_num_seqs=4, max_model_len=64, block_size=16)
    new = llm.engine.runner.new_blocks
    new.graphs = {size: SimpleNamespace(replay=lambda size=size: new.compute(size)) for size in ZERO_BUCKETS}
    sent.clear()
    llm.enqueue(prompts_of(5, 9), greedy(20))
    steps = []
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
        steps.append(sorted(sent))
        sent.clear()
    assert steps[0] == ["cuda_graphs", "input_batch", "prompt_graphs"], f"a step with prompts sends {steps[0]}"
    assert set(map(tuple, steps[1:])) == {(), ("input_batch",)} and len(steps) == 20, f"decodes send {steps[1:]}"
    assert steps.count(["input_batch"]) == 2, "each request got a second block"
