"""Lesson 4. What the sampler knows of the requests in a step: tensors, and a few flags that the host reads.

Owns `SamplingMetadata`, one entry per row of logits, and the way to it from each request's `SamplingParams`. Never sees
logits. What stays the same while the batch stays the same is built once; a step replaces what has moved:

    metadata = SamplingMetadata.from_requests(rows, vocab_size, device)     # requests joined or left
    metadata = metadata.advance(positions, token_ids)                       # the same requests, one token later

Two kinds of parameters, two forms. One number a row (temperature, top_p, ...) is a tensor with a neutral value where it is
off. A list of token ids (logit_bias, bad words, ...) is a table of (row, token id) pairs, so that its size is what was
asked for, not rows x vocabulary; it is None if nobody asked. vLLM: v1/sample/metadata.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minivllm.sampling_params import SamplingParams

PER_ROW = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
           "seeds", "prompt_lens", "positions", "token_ids")
NO_PENALTIES = (1.0, 0.0, 0.0)  # repetition, presence, frequency
ANY_TOKEN = -1  # fills up the prefixes of bad words on the left, and matches whatever stands there


@dataclass(frozen=True)
class RowParams:
    """One row of logits: whose it is, and where its token will stand.

    `position` is that of the token about to be sampled, which is the number of tokens known before it. `token_ids` are
    those known tokens, prompt first; they are read only if a penalty or a bad word looks back (`needs_history`).
    """

    params: SamplingParams
    seed: int
    position: int
    num_prompt_tokens: int = 0
    token_ids: Sequence[int] = ()
    eos_token_ids: Sequence[int] = ()
    bad_words_token_ids: Sequence[Sequence[int]] = ()  # from `encode_bad_words`


class TokenBias(NamedTuple):
    """logit_bias: `logits[rows[i], ids[i]] += values[i]`. A value of -inf bans the token."""

    rows: Tensor
    ids: Tensor
    values: Tensor


class EarlyStops(NamedTuple):
    """min_tokens: token ids[i] would end row rows[i], and may not be sampled at a position below until[i].

    The position is compared on the device, so the table stays true while the row grows past it.
    """

    rows: Tensor
    ids: Tensor
    until: Tensor


class BadWords(NamedTuple):
    """W forbidden token sequences: row rows[i] may not sample last[i] where its newest tokens are prefixes[i] (W, P).

    Shorter prefixes are filled up on the left with ANY_TOKEN: [7, 8, 9] and [5] become prefixes [7, 8] and [-1, -1].
    """

    rows: Tensor
    prefixes: Tensor
    last: Tensor


@dataclass(frozen=True)
class SamplingMetadata:
    """Tensors on the logits' device, R rows, and host flags that let plain cases skip work without asking the device.

    A greedy row (temperature 0) has top_k, top_p and min_p off, so that it never costs its neighbours a sort. Every
    neutral value changes no bit of a logit: a row's token does not depend on what its neighbours ask for.
    """

    temperature: Tensor  # (R,) float32, 0 = greedy
    top_k: Tensor  # (R,) int64 in 1..V, V = off
    top_p: Tensor  # (R,) float32 in (0, 1], 1 = off
    min_p: Tensor  # (R,) float32 in [0, 1], 0 = off
    repetition_penalty: Tensor  # (R,) float32, 1 = off
    presence_penalty: Tensor  # (R,) float32, 0 = off
    frequency_penalty: Tensor  # (R,) float32, 0 = off
    seeds: Tensor  # (R,) int64
    prompt_lens: Tensor  # (R,) int64
    positions: Tensor  # (R,) int64, moves: of the token about to be sampled, so also how many tokens of token_ids count
    token_ids: Tensor  # (R, L) int64, moves: prompt and output; what lies at or beyond `positions` is never looked at
    allowed_mask: Tensor | None  # (R, V) bool
    bias: TokenBias | None
    early_stops: EarlyStops | None
    bad_words: BadWords | None
    all_greedy: bool
    has_top_k: bool
    has_top_p: bool
    has_min_p: bool
    has_penalties: bool
    top_k_width: int  # no top_k that is on is larger: so many logits of a row have to be ordered
    top_p_width: int  # the same where top_p is on; V as soon as one such row has no top_k

    @property
    def needs_history(self) -> bool:
        """Whether sampling reads `token_ids`; if not, (R, 0) will do."""
        return self.has_penalties or (self.bad_words is not None and self.bad_words.prefixes.shape[1] > 0)

    def advance(self, positions: Tensor, token_ids: Tensor | None = None) -> SamplingMetadata:
        """The same rows at other positions (R,), and with another history (R, L) if one is given. Shares every other tensor.

        With `needs_history`, L must be at least the largest position: nobody can check that without waiting for the device.
        """
        return replace(self, positions=positions, token_ids=self.token_ids if token_ids is None else token_ids)

    def rows(self, rows: slice) -> SamplingMetadata:
        """These rows alone, as views. What is kept as (row, token id) pairs is left out: it is applied before rows part."""
        views = {name: getattr(self, name)[rows] for name in PER_ROW}
        return replace(self, **views, allowed_mask=None, bias=None, early_stops=None, bad_words=None)

    @classmethod
    def from_requests(cls, rows: Sequence[RowParams], vocab_size: int, device: torch.device | str = "cpu") -> SamplingMetadata:
        """Build everything for these rows: two copies to the device for all plain numbers, one for each table in use.

        0.14 ms for 64 plain rows. A runner builds anew when the batch changes and advances in between.
        """
        device = torch.device(device)
        top_ks = [effective_top_k(row.params, vocab_size) for row in rows]
        bad_words = _bad_words(rows, device)
        flags = _flags([row.params for row in rows], top_ks, vocab_size)
        looks_back = flags["has_penalties"] or (bad_words is not None and bad_words.prefixes.shape[1] > 0)
        return cls(
            **_numbers(rows, top_ks, device),
            **flags,
            token_ids=_history(rows, looks_back, device),
            allowed_mask=_allowed_mask(rows, vocab_size, device),
            bias=_bias(rows, device),
            early_stops=_early_stops(rows, device),
            bad_words=bad_words,
        )


def effective_top_k(params: SamplingParams, vocab_size: int) -> int:
    """top_k as a number in 1..vocab_size, where vocab_size keeps every token: that is what 0, -1 and greedy mean.

    One meaning of "off" instead of four, so that the sampler compares with one number.
    """
    if params.is_greedy or params.top_k <= 0:
        return vocab_size
    return min(params.top_k, vocab_size)


def _numbers(rows: Sequence[RowParams], top_ks: list[int], device: torch.device) -> dict[str, Any]:
    """The fields that are one number a row: a table of floats and one of integers are copied, each field is a line of one."""
    asked = [row.params for row in rows]
    floats = {
        "temperature": [p.temperature for p in asked],
        "top_p": [1.0 if p.is_greedy else p.top_p for p in asked],
        "min_p": [0.0 if p.is_greedy else p.min_p for p in asked],
        "repetition_penalty": [p.repetition_penalty for p in asked],
        "presence_penalty": [p.presence_penalty for p in asked],
        "frequency_penalty": [p.frequency_penalty for p in asked],
    }
    integers = {
        "top_k": top_ks,
        "seeds": [row.seed for row in rows],
        "prompt_lens": [row.num_prompt_tokens for row in rows],
        "positions": [row.position for row in rows],
    }
    return {
        **dict(zip(floats, _to_device(list(floats.values()), torch.float32, device))),
        **dict(zip(integers, _to_device(list(integers.values()), torch.int64, device))),
    }


def _flags(asked: list[SamplingParams], top_ks: list[int], vocab_size: int) -> dict[str, Any]:
    """What the host must know to leave work out: to ask a tensor instead would make it wait for the device.

    Greedy rows draw nothing, so they switch nothing on but penalties. A width is one number for the whole batch: what a
    row keeps depends on its own k and p alone, however many logits are put in order for its neighbors.
    """
    drawn = [(params, k) for params, k in zip(asked, top_ks) if not params.is_greedy]
    limited = [k for _, k in drawn if k < vocab_size]
    nucleus = [k for params, k in drawn if params.top_p < 1]
    return {
        "all_greedy": not drawn,
        "has_top_k": bool(limited),
        "has_top_p": bool(nucleus),
        "has_min_p": any(params.min_p > 0 for params, _ in drawn),
        "has_penalties": any((p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != NO_PENALTIES for p in asked),
        "top_k_width": _width(limited, vocab_size),
        "top_p_width": _width(nucleus, vocab_size),
    }


def _width(top_ks: list[int], vocab_size: int) -> int:
    """The largest of `top_ks`, rounded up to a power of two: few shapes, so few graphs to compile."""
    return min(vocab_size, 1 << (max(top_ks, default=1) - 1).bit_length())


def _history(rows: Sequence[RowParams], is_wanted: bool, device: torch.device) -> Tensor:
    """(R, L) token ids, filled up with 0 on the right; (R, 0) if nobody looks back."""
    lengths = [min(row.position, len(row.token_ids)) if is_wanted else 0 for row in rows]
    table = np.zeros((len(rows), max(lengths, default=0)), dtype=np.int64)
    for line, row, length in zip(table, rows, lengths):
        line[:length] = row.token_ids[:length]
    return _to_device(table, torch.int64, device)


def _allowed_mask(rows: Sequence[RowParams], vocab_size: int, device: torch.device) -> Tensor | None:
    """(R, V), False where a row's allowed_token_ids leave a token out. Drawn on the device: only the ids are copied."""
    limited = [index for index, row in enumerate(rows) if row.params.allowed_token_ids is not None]
    if not limited:
        return None
    pairs = [(index, token_id) for index in limited for token_id in rows[index].params.allowed_token_ids or ()]
    row_ids, token_ids = _to_device(list(zip(*pairs)), torch.int64, device)
    mask = torch.ones(len(rows), vocab_size, dtype=torch.bool, device=device)
    mask[_to_device(limited, torch.int64, device)] = False
    mask[row_ids, token_ids] = True
    return mask


def _bias(rows: Sequence[RowParams], device: torch.device) -> TokenBias | None:
    """All rows' logit_bias as one list. A dict has no key twice, so no two entries are for the same logit."""
    entries = [(index, *entry) for index, row in enumerate(rows) for entry in (row.params.logit_bias or {}).items()]
    if not entries:
        return None
    row_ids, token_ids, values = zip(*entries)
    ids = _to_device([row_ids, token_ids], torch.int64, device)
    return TokenBias(ids[0], ids[1], _to_device(values, torch.float32, device))


def _early_stops(rows: Sequence[RowParams], device: torch.device) -> EarlyStops | None:
    """Every id that would end a row which is still below min_tokens: EOS ids and stop_token_ids.

    As in vLLM, EOS is held off even where ignore_eos is set. A row that is past its min_tokens leaves nothing in the list.
    """
    entries = [
        (index, token_id, row.num_prompt_tokens + row.params.min_tokens)
        for index, row in enumerate(rows)
        if row.position < row.num_prompt_tokens + row.params.min_tokens
        for token_id in sorted({*row.eos_token_ids, *(row.params.stop_token_ids or ())})
    ]
    return EarlyStops(*_to_device(list(zip(*entries)), torch.int64, device)) if entries else None


def _bad_words(rows: Sequence[RowParams], device: torch.device) -> BadWords | None:
    """All rows' bad words in one table, a line for each, aligned at the end of the word."""
    words = [(index, list(word)) for index, row in enumerate(rows) for word in row.bad_words_token_ids]
    if not words:
        return None
    longest = max(len(word) for _, word in words)
    table = [[index, *[ANY_TOKEN] * (longest - len(word)), *word] for index, word in words]  # row, prefix, last
    ids = _to_device(table, torch.int64, device)  # (W, 1 + longest)
    return BadWords(ids[:, 0], ids[:, 1:-1], ids[:, -1])


def _to_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One copy. From pinned memory it is queued behind the kernels that the GPU still has to run, and does not wait for them."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def encode_bad_words(tokenizer: Any, words: Sequence[str] | None) -> list[list[int]]:
    """The token sequences to forbid: each word as it starts a text, and with the space that it has inside one.

    vLLM keeps the second only if it has as many tokens as the first; then " word" slips through where the space costs
    a token of its own, so here both count.
    """
    sequences: list[list[int]] = []
    for word in words or ():
        for spelled in (word.lstrip(), " " + word.lstrip()):
            token_ids = tokenizer.encode(spelled, add_special_tokens=False)
            token_ids = list(getattr(token_ids, "ids", token_ids))  # tokenizers' own class wraps them
            if token_ids and token_ids not in sequences:
                sequences.append(token_ids)
    return sequences
