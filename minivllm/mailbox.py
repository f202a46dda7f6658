"""Lesson 14. Where sampled tokens lie that the host wants to read: in its own memory, written there by the step itself.

Owns that memory. A copy between two decode steps costs 14 microseconds on an H200: 6 until it starts, 1 for the tokens, 7 until
the next step begins, and a step of a small model takes 560. But a GPU can write to the host's memory, if that is pinned. So a
sampler that is a part of a step writes its tokens twice: into their rows, where the next step finds them, and into a mailbox,
where the host does once it has waited for the step:

    slot        0   1   2   3   4 ... 63       row 2 has sampled the tokens at positions 129 and 130:
    row 2       .  17   5   .   .      .       slots 1 and 2, until it samples those at 193 and 194

A slot is a token's position, counted round, so no step has to be told which one is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from minivllm.input_batch import RowTensors

NUM_SLOTS = 64  # so many tokens of a row may be on their way: one step ahead that is two, and a draft model's guesses


def as_the_device_sees_it(pinned: Tensor, device: torch.device) -> Tensor:
    """The same memory as a tensor of the device, where its address is the same: torch takes arrays of a GPU as CuPy describes them,
    which is as NumPy does.
    """
    tensor = torch.as_tensor(SimpleNamespace(__cuda_array_interface__=pinned.numpy().__array_interface__), device=device)
    assert tensor.data_ptr() == pinned.data_ptr(), "a copy: what is written there would reach nobody"
    return tensor


class Mailbox:
    """The newest tokens of all rows, where the device writes and the host reads.

    A row's token has to be read before the row has sampled NUM_SLOTS more, and before the row has sampled for anybody else: the
    scheduler gives a row away only when nobody wants its last owner's tokens any more, or all of them have been read.
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.memory = torch.zeros(num_rows, NUM_SLOTS, dtype=torch.int32, pin_memory=on_gpu)
        self.tokens = as_the_device_sees_it(self.memory, device) if on_gpu else self.memory  # for kernels

    def reader(self, rows: np.ndarray, positions: np.ndarray) -> Callable[[], list[int]]:
        """On the host: what gives these tokens, once the step that samples them is over."""
        host, slots = self.memory.numpy(), positions % NUM_SLOTS
        return lambda: host[rows, slots].tolist()


def deliver(rows: RowTensors, index: Tensor, positions: Tensor, token_ids: Tensor) -> None:
    """On the device: sampled tokens (R,) become those at these positions (R,) int64 of the rows in `index` (R,), for the next step
    and for the host.
    """
    token_ids = token_ids.int()
    rows.token_ids[index, positions] = token_ids
    rows.mailbox.tokens[index, positions % NUM_SLOTS] = token_ids
