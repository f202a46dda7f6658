"""Lesson 14. The sampler that chat models ask for, as a CUDA graph: penalties, top_k, top_p and min_p in few passes.

Owns the form of `sampler.py` that a GPU likes. Qwen2.5's generation_config has a repetition penalty, a top_k of 20 and a top_p of
0.8, so this is how real checkpoints sample. `sampler.py` takes some fifty operations to it, of which most read all logits. Here

    the history      counts once: 1 for a token of the output, a trifle for one of the prompt
    the largest      are found in the 64 parts of the vocabulary whose largest logits are the largest
    top_k, top_p     look at these 64 alone, and with min_p become one threshold a row, so the last pass is `draw`
    top_p alone      puts nothing in order: its threshold is searched for, two bits of a float at a time (`narrow`)

Tokens are those of `sample`, bit for bit: ties at the threshold stay, and sums are sums of integers. What is asked for lies in the
rows (`RowTensors.cuts`), so nothing is built when the batch changes. Tokens that may not come are masked before; a logit_bias and a
top_k above 64 are left to `sample`.

vLLM: vllm/v1/sample/ops/topk_topp_sampler.py sorts all logits, or leaves it to FlashInfer or to a Triton kernel of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minivllm.compiled_model import OneAndMany
from minivllm.cuda_graphs import DecodeGraphs, at_least_two, bucket_of, bucket_sizes, record
from minivllm.input_batch import MOST_TOP_K, RowTensors
from minivllm.mailbox import deliver
from minivllm.sampler import NEVER, PART, draw, output_penalties, repetition_penalty

FAINT = 2.0**-20  # what a prompt's token counts: a million of them are not yet one of the output
WIDEST, NUM_PASSES = 2**29, 16  # the search for a threshold: its first step, a quarter of that next, and the last is 1


class SamplerGraphs:
    """What is drawn behind a decode graph in place of its own plain token: two graphs for each bucket, without and with the search
    that a top_p alone needs.
    """

    def __init__(self, decodes: DecodeGraphs) -> None:
        self.decodes = decodes
        self.penalize, self.sample_by_cuts, self.weigh_all, self.narrow = (
            OneAndMany(function) if decodes.use_compile else functools.partial(uncompiled, function)
            for function in (penalize, sample_by_cuts, weigh_all, narrow))
        self.graphs: dict[bool, dict[int, torch.cuda.CUDAGraph]] = {}
        self.results: dict[bool, dict[int, Tensor]] = {False: {}, True: {}}

    def capture(self) -> float:
        """Compile and record every bucket, once the decodes are. Returns the seconds that recording took."""
        sizes, total = bucket_sizes(self.decodes.max_num_seqs), 0.0
        for by_mass in (False, True):
            compute = functools.partial(self.compute, by_mass=by_mass)
            self.graphs[by_mass], self.results[by_mass], seconds = record(compute, sizes)
            total += seconds
        return total

    def compute(self, size: int, by_mass: bool) -> Tensor:
        """Token ids (B,) of the step that the bucket of this size has just computed."""
        index = self.decodes.index[:size]
        return self.sample(self.decodes.results[size][0], index, torch.zeros_like(index), by_mass=by_mass)

    def sample(self, logits: Tensor, index: Tensor, back: Tensor, *, by_mass: bool) -> Tensor:
        """A token (R,) for each of the logits (R, V) of the rows in `index` (R,), for a step of any kind. Behind guesses a row
        comes several times: then each token stands `back` (R,) int64 before the step's last. `by_mass`: some have a top_p alone.
        """
        count, (logits, index, back) = len(index), at_least_two(logits, index, back)
        rows = self.decodes.rows
        logits = self.penalize(len(index), logits, rows, index, back)
        floor = self.find_floor(logits, rows, index) if by_mass else torch.full(index.shape, NEVER, device=logits.device)
        return self.sample_by_cuts(len(index), logits, rows, index, back, floor)[:count]

    def find_floor(self, logits: Tensor, rows: RowTensors, index: Tensor) -> Tensor:
        """(R,): what no logit may be below, once the largest is 0 and temperature has divided it; -inf without a top_p alone."""
        logits, mass = self.weigh_all(len(index), logits, rows, index)
        low = torch.zeros(len(index), dtype=torch.int32, device=logits.device)
        step = torch.full_like(low, WIDEST)
        for _ in range(NUM_PASSES):
            low, step = self.narrow(len(index), logits, mass, low, step)
        return (-low.view(torch.float32)).masked_fill(mass < 0, NEVER)

    def run(self, num_requests: int, *, by_mass: bool) -> Tensor:
        """Token ids (B,) of the decode step that was launched last. Valid until the next run."""
        size = bucket_of(num_requests, self.decodes.max_num_seqs)
        if self.decodes.use_graphs:
            self.graphs[by_mass][size].replay()
        else:
            self.results[by_mass][size] = self.compute(size, by_mass)
        return self.results[by_mass][size][:num_requests]


def uncompiled(function: Callable[..., Any], num_rows: int, *args: Any) -> Any:
    """Called like an `OneAndMany`."""
    return function(*args)


def penalize(logits: Tensor, rows: RowTensors, index: Tensor, back: Tensor) -> Tensor:
    """`apply_penalties` for logits (R, V) of the rows in `index` (R,), in float32. A token may stand `back` (R,) before the row's
    position: a row's guesses stand in it already, and count as far as they lie before.
    """
    logits, token_ids = logits.float(), rows.token_ids[index]  # (R, L)
    *_, repetition, presence, frequency, prompt_lens = rows.cuts[:, index]  # (R,) each
    columns = torch.arange(token_ids.shape[1], device=token_ids.device)
    is_known = columns < (rows.positions[index].long() - back)[:, None]  # (R, L)
    weights = torch.where(columns < prompt_lens[:, None], FAINT, 1.0) * is_known
    # Unknown tokens add nothing, each to a number of its own: all to the same one, they would wait for each other.
    where = torch.where(is_known, token_ids, columns % logits.shape[1]).long()
    counts = torch.zeros_like(logits).scatter_add_(1, where, weights)
    logits = repetition_penalty(logits, counts > 0, repetition)
    return output_penalties(logits, counts.floor(), presence, frequency)


def sample_by_cuts(logits: Tensor, rows: RowTensors, index: Tensor, back: Tensor, floor: Tensor) -> Tensor:
    """A token (R,) for each of the penalized logits (R, V), as the rows in `index` (R,) ask for; it is written where it stands in
    its row, `back` (R,) before the row's position. None is drawn whose logit lies below the `floor` (R,) of a top_p alone.
    """
    positions, (is_greedy, temperature) = rows.positions[index].long() - back, temperatures(rows, index)
    ordered = largest_by_parts(logits, MOST_TOP_K)  # (R, 64), descending
    largest = ordered[:, :1]
    logits, ordered = (logits - largest) / temperature, (ordered - largest) / temperature
    least = torch.maximum(floor[:, None], threshold(logits, ordered, rows.cuts[:, index, None]))
    token_ids = draw(logits.masked_fill(logits < least, NEVER), rows.seed_keys[index], positions, 1.0 - is_greedy.float())
    deliver(rows, index, positions, token_ids)
    return token_ids


def temperatures(rows: RowTensors, index: Tensor) -> tuple[Tensor, Tensor]:
    """(R, 1) each: which of the rows in `index` (R,) are greedy, and by what to divide their logits, 1 for those."""
    temperature = rows.temperature[index][:, None]
    return temperature == 0, temperature.masked_fill(temperature == 0, 1)


def weigh_all(logits: Tensor, rows: RowTensors, index: Tensor) -> tuple[Tensor, Tensor]:
    """Penalized logits (R, V) as `sample_by_cuts` has them before it cuts any off, and top_p of what they weigh together (R,)
    float64; -1 for rows whose top_p is off or behind a top_k.
    """
    logits = (logits - in_parts(logits).amax(dim=2).amax(dim=1, keepdim=True)) / temperatures(rows, index)[1]
    top_k, top_p = rows.cuts[:2, index]
    mass = top_p.double() * in_parts(weigh(logits)).sum(dim=2).sum(dim=1)
    return logits, mass.masked_fill((top_k > 0) | (top_p >= 1), -1)


def narrow(logits: Tensor, mass: Tensor, low: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """One pass of the search for the smallest logit that a top_p keeps: what is above it weighs less than `mass` (R,).

    Numbers below 0 lie in the order of their bits, read as an integer `low` (R,) int32: 0 is the largest logit, which stays in any
    case. Of low, low + step, low + 2 step and low + 3 step (R,) int32 the last one stays that weighs too little still.
    """
    weights, found = weigh(logits), torch.zeros_like(low)
    for count in (1, 2, 3):
        bound = -(low + count * step).view(torch.float32)[:, None]
        above = in_parts(weights.masked_fill(logits <= bound, 0)).sum(dim=2).sum(dim=1)
        found = found + (above.double() < mass).int()
    return low + found * step, (step // 4).clamp(min=1)


def in_parts(x: Tensor) -> Tensor:
    """(R, V) as (R, P, size): what is summed within parts first keeps all of a GPU busy, if there is only one row."""
    return x.unflatten(1, (-1, math.gcd(x.shape[1], PART)))


def largest_by_parts(logits: Tensor, num: int) -> Tensor:
    """The `num` largest of each row of logits (R, V), in descending order.

    At most `num` parts hold any of them, and these have the largest maxima. Of parts that tie any will do: values count, not ids.
    """
    parts = in_parts(logits)  # (R, P, size)
    _, chosen = parts.amax(dim=-1).topk(min(num, parts.shape[1]))  # (R, at most num)
    candidates = parts.gather(1, chosen[..., None].expand(-1, -1, parts.shape[2])).flatten(1)
    return candidates.topk(min(num, candidates.shape[1])).values


def weigh(logits: Tensor) -> Tensor:
    """`token_weights` where each row's largest logit is 0."""
    return (logits.exp() * 2.0**40).long()


def threshold(logits: Tensor, ordered: Tensor, cuts: Tensor) -> Tensor:
    """(R, 1): what no logit (R, V) may be below by top_k, top_p and min_p, one after the other. The largest logit is 0.

    `ordered` (R, at most 64) are the largest. A top_p behind a top_k keeps none of the others but for ties; one alone has a floor.
    """
    top_k, top_p, min_p = cuts[:3]  # (R, 1) each
    last = (top_k.long() - 1).clamp(0, ordered.shape[1] - 1)
    kth = ordered.gather(1, last).masked_fill(top_k == 0, NEVER)
    ordered = ordered.masked_fill(ordered < kth, NEVER)
    weights, total = weigh(ordered), in_parts(weigh(logits.masked_fill(logits < kth, NEVER))).sum(dim=2).sum(dim=1, keepdim=True)
    # A token stays if those that are likelier sum to less than top_p; the likeliest stays in any case.
    is_kept = ((weights.cumsum(dim=1) - weights).double() < top_p.double() * total) | (ordered == 0)
    smallest = ordered.masked_fill(~is_kept, float("inf")).amin(dim=1, keepdim=True).masked_fill((top_p >= 1) | (top_k == 0), NEVER)
    return torch.maximum(torch.maximum(kth, smallest), min_p.log())
