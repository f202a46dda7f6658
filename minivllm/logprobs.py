"""Lesson 4. Log-probabilities as users ask for them: of the raw logits, before temperature, penalties and masks.

Owns the way from logits to `dict[token id, Logprob]`. Never touches what is sampled. A prompt's logprobs need the logits
of every position: in chunks, since 1,000 tokens of a vocabulary of 151,936 would be 608 MB at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minivllm.request import Logprob

if TYPE_CHECKING:
    from minivllm.input_batch import InputBatch, RowTensors, StepInputs

PromptLogprobs = dict[str, tuple[int, list[dict[int, Logprob]]]]  # by request: the first position, and one entry for each
WHOLE_VOCABULARY = -1


class LogprobsTensors(NamedTuple):
    """For each row the chosen token, then the k most likely in order. All on the logits' device."""

    token_ids: Tensor  # (R, 1 + k) int64
    logprobs: Tensor  # (R, 1 + k) float32
    ranks: Tensor  # (R, 1 + k) int64


def compute_logprobs(logits: Tensor, token_ids: Tensor, num_logprobs: int) -> LogprobsTensors:
    """Log-probabilities of the chosen tokens (R,) and of the num_logprobs (-1: all) most likely of each row (R, V).

    In float32 whatever the logits are. A rank is 1 + the number of tokens that are strictly more likely.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = logprobs.gather(-1, token_ids[:, None])  # (R, 1)
    chosen_rank = 1 + (logprobs > chosen).sum(dim=-1, keepdim=True)
    k = logits.shape[-1] if num_logprobs == WHOLE_VOCABULARY else min(num_logprobs, logits.shape[-1])
    best, best_ids = logprobs.topk(k, dim=-1)  # (R, k), descending
    ids, values = torch.cat([token_ids[:, None], best_ids], dim=-1), torch.cat([chosen, best], dim=-1)
    return LogprobsTensors(ids, values, torch.cat([chosen_rank, ordered_ranks(best)], dim=-1))


def ordered_ranks(best: Tensor) -> Tensor:
    """Ranks of logprobs (R, k) in descending order: 1, 2, 3 ..., and those that tie share the first one's."""
    places = torch.arange(1, best.shape[-1] + 1, device=best.device).expand_as(best)
    is_tie = torch.zeros_like(best, dtype=torch.bool)
    is_tie[:, 1:] = best[:, 1:] == best[:, :-1]
    return places.masked_fill(is_tie, 0).cummax(dim=-1).values if best.numel() else places


def to_dicts(tensors: LogprobsTensors, num_logprobs: Sequence[int] | None = None) -> list[dict[int, Logprob]]:
    """One dict a row in vLLM's shape: the chosen token first, then the most likely in order; 1 to 1 + k entries.

    `num_logprobs` says for each row how many it asked for, if rows asked for less than was computed. Waits for the device.
    """
    token_ids, logprobs, ranks = (tensor.tolist() for tensor in tensors)
    asked = [WHOLE_VOCABULARY] * len(token_ids) if num_logprobs is None else num_logprobs
    dicts = []
    for row, k in enumerate(asked):
        end = None if k == WHOLE_VOCABULARY else 1 + k
        entries = zip(token_ids[row][:end], logprobs[row][:end], ranks[row][:end])
        # The chosen token may come again among the most likely, with equal values: it keeps the first place.
        dicts.append({token_id: Logprob(logprob, rank) for token_id, logprob, rank in entries})
    return dicts


def prompt_logprobs(hidden: Tensor, next_token_ids: Tensor, compute_logits: Callable[[Tensor], Tensor], num_logprobs: int,
                    chunk: int = 64) -> Iterator[dict[int, Logprob]]:
    """For each hidden state (n, E) the logprobs of the prompt token (n,) that follows it, computed `chunk` rows at a time.

    64 rows of a vocabulary of 151,936 are 39 MB of float32 logits, however long the prompt is.
    """
    assert hidden.shape[0] == next_token_ids.shape[0], "every hidden state predicts one token"
    for states, token_ids in zip(hidden.split(chunk), next_token_ids.split(chunk)):
        yield from to_dicts(compute_logprobs(compute_logits(states), token_ids, num_logprobs))


def step_prompt_logprobs(batch: InputBatch, rows: RowTensors, inputs: StepInputs, hidden: Tensor,
                         compute_logits: Callable[[Tensor], Tensor]) -> PromptLogprobs:
    """For requests that asked: logprobs of the prompt tokens that a step's positions predict, from all of its hidden states (T, E).

    Waits for the device.
    """
    found: PromptLogprobs = {}
    starts = np.cumsum(inputs.query_lens) - inputs.query_lens
    for index, row in enumerate(inputs.rows):
        request = batch.request(row)
        end = min(int(inputs.seq_lens[index]), request.num_prompt_tokens - 1)  # the prompt's last position predicts output
        first = int(inputs.seq_lens[index] - inputs.query_lens[index])
        if request.params.prompt_logprobs is None or first >= end:
            continue  # did not ask, or is past its prompt
        states = hidden[starts[index] : starts[index] + end - first]  # (end - first, E)
        following = rows.token_ids[row, first + 1 : end + 1].long()  # (end - first,) what came there
        entries = prompt_logprobs(states, following, compute_logits, request.params.prompt_logprobs)
        found[request.request_id] = (first + 1, list(entries))
    return found
