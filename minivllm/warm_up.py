"""Lesson 14. Before the first request comes: everything is compiled and recorded that a step may need.

Owns the order of it, and the steps of nobody's tokens by which it is done: they write to the null block, and nothing is counted.
A kernel that was left out would be compiled by the first request that needs it, who would wait for seconds. So whatever makes
torch.compile write another kernel has to come here: a number of rows that is one, a branch on how many there are.

    logits             of the largest decode steps of each kind (split_linear.py), and of one request: the model
    no graph           few tokens, more and many, and all hidden states, one or two asked for: attention of prompts, and the rest
    logits             of all buckets of batch sizes: attention, which another process may have compiled (compile_ahead.py)
    decode graphs      the same with samplers behind them, which likewise, and verifications, if somebody guesses
    other graphs       the head behind other steps, prompts of each bucket of tokens, new blocks: only recorded, not compiled

On a CPU nothing is compiled, and the same objects compute every step as they would record it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from minivllm.attention import NULL_BLOCK
from minivllm.compiled_model import CompiledModel, compiling
from minivllm.cuda_graphs import DecodeGraphs, bucket_sizes
from minivllm.graph_sampler import SamplerGraphs
from minivllm.input_batch import StepInputs
from minivllm.model_runner import ModelRunner
from minivllm.prompt_graphs import PromptGraphs, token_buckets
from minivllm.split_linear import FEW_TOKENS, MOST_TOKENS
from minivllm.transfers import upload
from minivllm.verify_graphs import VerifyGraphs


def warm_up(runner: ModelRunner, wait_for: Callable[[str], None]) -> float:
    """Give a runner its graphs, recorded where there is a GPU. Returns the seconds that recording took of it.

    `wait_for` is called for each part that another process may be compiling, once nothing else is left to do.
    """
    on_gpu, config = runner.device.type == "cuda", runner.config
    if on_gpu:
        runner.forward_model = CompiledModel(runner.model)
        # By itself torch takes 32 kernels to zero blocks of a large cache. Without its shape the one kernel would divide by it for
        # every number, ten times slower; and to choose between two, torch would keep a copy of the cache in pinned host memory.
        new = runner.new_blocks
        torch._dynamo.mark_static(new.blocks)
        new.zero_blocks = torch.compile(new.zero_blocks, dynamic=True, options={"triton.autotune_pointwise": False})
    buckets = token_buckets(config.max_num_batched_tokens or 0, sum(weight.numel() for weight in runner.model.parameters()))
    decodes = DecodeGraphs(runner.model, runner.forward_model, runner.kv_caches, runner.rows, config.max_num_seqs,
                           use_graphs=on_gpu, use_compile=on_gpu)
    prompts = PromptGraphs(runner.forward_model, runner.kv_caches, runner.rows, runner.model.config, buckets, decodes.states,
                           use_graphs=on_gpu)
    verifications = VerifyGraphs(decodes, runner.num_drafts) if runner.num_drafts else None
    samplers = SamplerGraphs(decodes)
    runner.prompt_graphs, runner.graphs, runner.verify_graphs = prompts, decodes, verifications
    runner.sampler.decode_graphs, runner.sampler.sampler_graphs = decodes, samplers
    if not on_gpu:
        return 0.0
    with compiling():
        compile_model(runner, decodes, wait_for)
        wait_for("sampler")
        seconds = decodes.capture() + samplers.capture() + (verifications.capture() if verifications else 0.0)
        return seconds + prompts.capture() + runner.new_blocks.capture()


def compile_model(runner: ModelRunner, decodes: DecodeGraphs, wait_for: Callable[[str], None]) -> None:
    """All that steps need up to their logits."""
    sizes = bucket_sizes(decodes.max_num_seqs)
    # The largest first: torch.compile chooses tiles by the first size that it sees.
    largest = {max(size for size in sizes if size <= most) for most in (sizes[-1], MOST_TOKENS, FEW_TOKENS, 1)}
    for size in sorted(largest, reverse=True):
        decodes.compute_step_logits(size)
    # Steps beyond the largest graph run uncaptured, and their first one must not be the one that compiles.
    for num_tokens in (2, FEW_TOKENS + 2, MOST_TOKENS + 2):
        inputs = padding_inputs(num_tokens, runner.rows.padding_row)
        for wanted in all_one_and_two(runner.device):
            runner.forward_ungraphed(inputs, wanted)
    runner.new_blocks.zero(np.array([NULL_BLOCK]))
    wait_for("attention")
    for size in reversed(sizes):
        decodes.compute_step_logits(size)


def all_one_and_two(device: torch.device) -> Iterator[Tensor | None]:
    """The hidden states that a step may be asked for: torch.compile makes one row something of its own."""
    yield None
    for count in (1, 2):
        yield upload(np.arange(count), device)


def padding_inputs(num_tokens: int, padding_row: int) -> StepInputs:
    """A decode and prompts of two tokens that belong to nobody: `num_tokens` rounded up to an odd number.

    All stand in the padding row, whose table holds nothing but the null block.
    """
    query_lens = np.array([1] + [2] * (num_tokens // 2))
    rows = np.full(len(query_lens), padding_row)
    positions = np.concatenate(([0], np.tile([0, 1], num_tokens // 2)))
    return StepInputs(rows, query_lens, query_lens, rows.repeat(query_lens), positions, 1, np.zeros(len(rows), dtype=bool),
                      np.zeros(len(rows), dtype=np.int64))
