"""Lesson 9. Between host and device: copies that nobody waits for.

Owns how numbers go up and come down. On a GPU each copy is one more entry in its queue, from memory or into memory that the system
must not move ("pinned"), and the host goes on at once:

    host      launch a step | copy the next tokens up | copy its tokens down | mark | launch the next step ...
    device    ............... the step .............. | up | down | the next step ...      the mark is passed: the host may read

On a CPU everything is done when a call returns, and most of this does nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """One copy to the device. From pinned memory, which torch hands out anew only when the copy is done, so that no later
    step can overwrite what is still being read.
    """
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def upload_into(target: Tensor, values: np.ndarray) -> None:
    """The same into memory of the device that is there already, of the same shape."""
    tensor = torch.from_numpy(values)
    target.copy_(tensor.pin_memory() if target.is_cuda else tensor, non_blocking=True)


def download(tensor: Tensor) -> Tensor:
    """A copy on the host, which is there when the device has reached this point. On a CPU the tensor itself."""
    return tensor.to("cpu", non_blocking=True)  # torch takes pinned memory then


def mark(tensor: Tensor | None) -> torch.cuda.Event | None:
    """A mark in the queue of the tensor's device, behind all that was launched so far. None on a CPU, where nobody waits."""
    return torch.cuda.current_stream(tensor.device).record_event() if tensor is not None and tensor.is_cuda else None
