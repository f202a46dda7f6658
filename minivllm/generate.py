"""Lessons 0, 2, 5 and 8. The naive rungs: generation as one loop around one function, each rung cheaper than the one before.

Owns four loops (recompute everything, dense cache, left-padded batch, shuffled blocks) and the counters that compare them.
Never schedules: requests start together (lesson 6 is in slot_batching.py, the engine begins in lesson 7).

    prompt of 64, 64 new tokens      positions computed
    greedy                           64 + 65 + ... + 127 = 6,112
    greedy_cached                    64 + 63 * 1         =   127

All give the same tokens, those of Hugging Face's `generate(do_sample=False)`. An end-of-sequence token is part of the output.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from minivllm.attention import AttentionMetadata, PagedAttention, allocate_kv_cache
from minivllm.dense_cache import DenseCache, DenseMetadata
from minivllm.model import NoCache, Qwen2ForCausalLM


@dataclass
class GenerationStats:
    """What a run cost: positions_computed == useful_positions + recomputed_positions + padded_positions.

    A position is one token through the whole model. It is useful the first time; the last token of an output is never computed.
    """

    steps: int = 0
    useful_positions: int = 0
    recomputed_positions: int = 0  # computed before, and forgotten
    padded_positions: int = 0  # no token of any request that still runs
    kv_slots_written: int = 0  # one slot holds K and V of one token in all layers
    kv_slots_repacked: int = 0  # not moved here: what rebuilding a tight dense batch at each join and leave would copy

    @property
    def positions_computed(self) -> int:
        return self.useful_positions + self.recomputed_positions + self.padded_positions


def next_token_ids(model: Qwen2ForCausalLM, hidden: Tensor) -> Tensor:
    """The likeliest next token after each of the rows (R, E): (R,). Lesson 4 replaces it by a choice."""
    return model.compute_logits(hidden).argmax(-1)


@torch.inference_mode()
def greedy(
    model: Qwen2ForCausalLM, prompt_token_ids: Sequence[int], max_new_tokens: int, eos_token_ids: Collection[int] = (),
    stats: GenerationStats | None = None,
) -> list[int]:
    """Run the model over all tokens so far, append the likeliest next one, repeat; return the new tokens.

    Ends after max_new_tokens or with the first token that is in eos_token_ids. `model(ids, positions, caches, metadata)`, with
    ids and positions (T,), gives a hidden state for each token, (T, E); caches are one `NoCache()` for each of
    `model.model.layers`, which forget, and metadata is `SimpleNamespace(slot_mapping=None)`. In `stats` each pass is a step, and
    a token is recomputed in every pass but its first, in which it is useful.
    """
    stats = stats or GenerationStats()
    caches = [NoCache() for _ in model.model.layers]
    tokens, num_computed = list(prompt_token_ids), 0  # num_computed: for the counters only, nothing is kept
    for _ in range(max_new_tokens):
        ids = torch.tensor(tokens, device=model.lm_head.weight.device)  # (T,)
        hidden = model(ids, torch.arange(len(ids), device=ids.device), caches, SimpleNamespace(slot_mapping=None))  # (T, E)
        stats.steps += 1
        stats.recomputed_positions += num_computed
        stats.useful_positions += len(tokens) - num_computed
        num_computed = len(tokens)
        tokens.append(int(next_token_ids(model, hidden[-1])))  # only the last row has seen every token
        if tokens[-1] in eos_token_ids:
            break
    return tokens[len(prompt_token_ids) :]


def dense_caches(model: Qwen2ForCausalLM, num_rows: int, max_len: int) -> list[DenseCache]:
    """An empty dense cache for each layer, in the model's type and on its device."""
    weight = model.lm_head.weight
    return [DenseCache(num_rows, max_len, model.config, weight.dtype, weight.device) for _ in model.model.layers]


def dense_step(
    model: Qwen2ForCausalLM, caches: list[DenseCache], ids: Tensor, positions: Tensor, first: Tensor, stats: GenerationStats,
    num_useful: int, first_row: int = 0,
) -> Tensor:
    """Run Tq tokens of each of B neighboring rows, ids and positions (B, Tq), and return each row's next token (B,).

    A token stands in column first + position of its row; left padding has negative positions and so stands before `first`.
    What padding computes is wrong and harmless: no mask shows it. `num_useful` of the B * Tq positions belong to a request.
    """
    metadata = DenseMetadata.build(positions + first[:, None], first, caches[0].max_len, first_row)
    hidden = model(ids.flatten(), positions.flatten(), caches, metadata)  # (T, E)
    stats.kv_slots_written += ids.numel()
    stats.useful_positions += num_useful
    stats.padded_positions += ids.numel() - num_useful
    return next_token_ids(model, hidden.unflatten(0, ids.shape)[:, -1])  # (B, Tq, E) -> (B, E) -> (B,)


@torch.inference_mode()
def greedy_cached(
    model: Qwen2ForCausalLM, prompt_token_ids: Sequence[int], max_new_tokens: int, eos_token_ids: Collection[int] = (),
    stats: GenerationStats | None = None,
) -> list[int]:
    """The same tokens, with keys and values kept: the prompt once, then one position for each new token.

    `dense_caches` of one row hold prompt and output; `dense_step` computes what is not in them, and counts all but the steps.
    """
    stats = stats or GenerationStats()
    tokens, num_computed = list(prompt_token_ids), 0
    caches = dense_caches(model, 1, len(tokens) + max_new_tokens)  # reserved for the longest output, whatever comes
    first = torch.tensor([0], device=model.lm_head.weight.device)  # (B,) = (1,): no padding
    for _ in range(max_new_tokens):
        ids = torch.tensor([tokens[num_computed:]], device=first.device)  # (1, Tq): what is not in the cache yet
        positions = torch.arange(num_computed, len(tokens), device=first.device)[None]  # (1, Tq)
        stats.steps += 1
        num_computed = len(tokens)
        tokens.append(int(dense_step(model, caches, ids, positions, first, stats, num_useful=ids.numel())))
        if tokens[-1] in eos_token_ids:
            break
    return tokens[len(prompt_token_ids) :]


def left_pad(prompts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """A rectangle of prompts that end together, so that every row's next token has the same column: ids, positions, mask.

    All are (B, L), with L the longest prompt. Padding stands left: id 0, mask False. The mask is True on real tokens. The
    positions count 0, 1, 2, ... from each row's first real token, and backwards, ..., -2, -1, over its padding.
    """
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)  # (B, L)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)  # (B,)
    positions = torch.arange(longest, device=device) - padding[:, None]  # (B, L)
    return ids, positions, positions >= 0


def is_done(output: Sequence[int], limit: int, eos_token_ids: Collection[int]) -> bool:
    """An output has ended: it is as long as it may be, or its last token says so."""
    return len(output) >= limit or (len(output) > 0 and output[-1] in eos_token_ids)


def as_limits(max_new_tokens: int | Sequence[int], num_requests: int) -> list[int]:
    """One limit for each request."""
    return [max_new_tokens] * num_requests if isinstance(max_new_tokens, int) else list(max_new_tokens)


@torch.inference_mode()
def greedy_static_batch(
    model: Qwen2ForCausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int],
    eos_token_ids: Collection[int] = (), stats: GenerationStats | None = None,
) -> list[list[int]]:
    """All prompts in one left-padded batch, which runs until its longest request has ended; outputs in the prompts' order."""
    stats = stats or GenerationStats()
    limits = as_limits(max_new_tokens, len(prompts))
    outputs: list[list[int]] = [[] for _ in prompts]
    ids, positions, mask = left_pad(prompts, model.lm_head.weight.device)  # (B, L)
    first = (~mask).sum(1)  # (B,)
    caches = dense_caches(model, len(prompts), ids.shape[1] + max(limits))
    running = [row for row, limit in enumerate(limits) if limit > 0]
    while running:
        # The first pass computes all prompts, the later ones one column: a mask (B, 1) of True, for every row began long ago.
        next_ids = dense_step(model, caches, ids, positions, first, stats, num_useful=int(mask[running].sum()))  # (B,)
        stats.steps += 1
        for row in running:
            outputs[row].append(int(next_ids[row]))
        running = [row for row in running if not is_done(outputs[row], limits[row], eos_token_ids)]
        # A row that has ended goes on, with tokens that nobody reads: the rectangle does not shrink.
        ids, positions, mask = next_ids[:, None], positions[:, -1:] + 1, mask[:, -1:]  # (B, 1)
    return outputs


@torch.inference_mode()
def greedy_paged(
    model: Qwen2ForCausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int],
    eos_token_ids: Collection[int] = (), stats: GenerationStats | None = None, block_size: int = 16, seed: int = 0,
) -> list[list[int]]:
    """All prompts over one pool of blocks, taken in random order as they fill up: no padding, and requests leave when they end.

    The bridge from lesson 7 to the engine: block tables without a manager, steps without a scheduler. The pool is large enough
    for everybody, and nobody gives a block back; what happens when it is not is lesson 9.
    """
    stats = stats or GenerationStats()
    limits, tokens = as_limits(max_new_tokens, len(prompts)), [list(prompt) for prompt in prompts]
    free = [1 + block for block in range(sum(-(-(len(t) + n) // block_size) for t, n in zip(tokens, limits)))]
    random.Random(seed).shuffle(free)
    caches = paged_caches(model, 1 + len(free), block_size)  # 1: the null block
    tables: list[list[int]] = [[] for _ in prompts]
    num_computed = [0] * len(prompts)
    running = [row for row, limit in enumerate(limits) if limit > 0]
    while running:
        for row in running:
            # A table grows only when the last block is full: at most block_size - 1 slots of a request are empty.
            while len(tables[row]) * block_size < len(tokens[row]):
                tables[row].append(free.pop())
        next_ids = paged_step(model, caches, [tokens[row] for row in running], [num_computed[row] for row in running],
                              [tables[row] for row in running], stats)
        for row, token in zip(running, next_ids):
            num_computed[row] = len(tokens[row])
            tokens[row].append(token)
        running = [row for row in running if not is_done(tokens[row][len(prompts[row]) :], limits[row], eos_token_ids)]
    return [t[len(prompt) :] for t, prompt in zip(tokens, prompts)]


def paged_caches(model: Qwen2ForCausalLM, num_blocks: int, block_size: int) -> list[PagedAttention]:
    """An empty pool of blocks for each layer; block 7 of one layer and block 7 of the next hold the same tokens."""
    weight, config = model.lm_head.weight, model.config
    kv_cache = allocate_kv_cache(config.num_hidden_layers, num_blocks, block_size, config.num_key_value_heads, config.head_dim,
                                 weight.dtype, weight.device)
    return [PagedAttention(layer, block_size) for layer in kv_cache]


def paged_step(
    model: Qwen2ForCausalLM, caches: list[PagedAttention], tokens: list[list[int]], num_computed: list[int],
    block_tables: list[list[int]], stats: GenerationStats,
) -> list[int]:
    """Compute what is not computed yet of each request, all in one flat batch (T,), and return each one's next token.

    Prompts and single new tokens differ in nothing but their number: this is already the engine's step (lesson 9).
    """
    device = model.lm_head.weight.device
    query_lens, seq_lens = [len(t) - done for t, done in zip(tokens, num_computed)], [len(t) for t in tokens]
    metadata = AttentionMetadata.build(query_lens, seq_lens, block_tables, caches[0].block_size, device)
    ids = torch.tensor([token for t, done in zip(tokens, num_computed) for token in t[done:]], device=device)  # (T,)
    positions = torch.tensor([p for done, end in zip(num_computed, seq_lens) for p in range(done, end)], device=device)  # (T,)
    hidden = model(ids, positions, caches, metadata)  # (T, E)
    stats.steps += 1
    stats.useful_positions += len(ids)
    stats.kv_slots_written += len(ids)
    last = metadata.query_start_loc[1:].long() - 1  # (B,) the row of each request's last token
    return next_token_ids(model, hidden[last]).tolist()
