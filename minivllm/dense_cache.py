"""Lesson 2. Remember keys and values: the past does not change, so a token's K and V are computed once and kept.

Owns the dense cache of one layer: a row for each request, as long as the longest one may become, filled from left to right.
Never knows a request. Three rungs stand on it: one sequence, a left-padded batch (lesson 5), rows that change their owner
(lesson 6). What a row reserves and does not use is lost; lesson 7 counts it (blocks use 96 % of theirs, rows 30 %).

    row 0   [ .  .  a  b  c  d  e  _ ]     first = 2: two columns of left padding, five tokens
    row 1   [ f  g  h  i  j  k  l  _ ]     first = 0
              column 0 ...        6        a query in column 6 of row 0 may look at columns 2..6
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minivllm.config import ModelConfig
from minivllm.model import attention


def causal_mask(columns: Tensor, first: Tensor) -> Tensor:
    """Who may look where: result[b, i, s] is True if first[b] <= s <= columns[b, i].

    columns (B, Tq) are the columns in which the queries stand; first (B,) is where each row's tokens begin, after the left
    padding. Neither the future nor padding is seen. The result (B, Tq, S) covers columns 0 to the greatest of `columns`.
    """
    keys = torch.arange(int(columns.max()) + 1, device=columns.device)  # (S,)
    is_past = keys <= columns[:, :, None]  # (B, Tq, S)
    return is_past & (keys >= first[:, None, None])


@dataclass
class DenseMetadata:
    """What one step tells every layer: B neighboring rows of the cache with Tq query tokens each, so T = B * Tq."""

    rows: slice  # neighbors, because a slice of the cache is a view and a list of rows would copy it
    slot_mapping: Tensor  # (T,) int64  row * max_len + column: where each token's K and V go
    mask: Tensor  # (B, Tq, S) bool

    @classmethod
    def build(cls, columns: Tensor, first: Tensor, max_len: int, first_row: int = 0) -> DenseMetadata:
        """The step whose queries stand in `columns` (B, Tq) of rows first_row, first_row + 1, ..."""
        assert int(columns.min()) >= 0, "columns count from a row's left end: a negative one lies in the row above"
        rows = torch.arange(first_row, first_row + len(columns), device=columns.device)[:, None]  # (B, 1)
        slots = (rows * max_len + columns).flatten()  # (T,)
        return cls(slice(first_row, first_row + len(columns)), slots, causal_mask(columns, first))


class DenseCache:
    """One layer's K and V, (rows, K, max_len, D) each, zero at first."""

    def __init__(self, num_rows: int, max_len: int, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        shape = (num_rows, config.num_key_value_heads, max_len, config.head_dim)
        self.max_len = max_len
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def append(self, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        """Keep k and v (T, K, D), token i in row slot_mapping[i] // max_len, column slot_mapping[i] % max_len; in place.

        Whatever was in that place is replaced, and nothing else changes.
        """
        rows, columns = slot_mapping // self.max_len, slot_mapping % self.max_len  # (T,)
        self.keys[rows, :, columns] = k  # one assignment writes the cache; `keys[rows][...] = k` would write a copy
        self.values[rows, :, columns] = v

    write = append  # the name under which the model calls it

    def attend(self, q: Tensor, metadata: DenseMetadata) -> Tensor:
        """Each query (T, H, D) over the columns of its own row that the mask shows: (T, H, D)."""
        num_rows, num_queries, num_columns = metadata.mask.shape
        k = self.keys[metadata.rows, :, :num_columns]  # (B, K, S, D), a view
        v = self.values[metadata.rows, :, :num_columns]
        q = q.unflatten(0, (num_rows, num_queries)).transpose(1, 2)  # (B, H, Tq, D)
        return attention(q, k, v, metadata.mask).transpose(1, 2).flatten(0, 1)  # (T, H, D)
