"""Lesson 9. On a CPU: every matrix in the order in which the processor's matrix product reads it, sorted once at start.

Owns the packed matrices. `F.linear` hands BLAS a matrix as the checkpoint has it, row by row; oneDNN can be given it in blocks of
its own (torch.compile asks for that when it may freeze weights). With a decode step's 8 to 64 rows it saves a tenth to a half:

    rows of x          1     2     8    32      896 x 151,936, two threads, milliseconds
    F.linear        18.6  19.2  61.1  73.4
    packed          19.0  20.5  23.5  44.3      one or two rows of small matrices lose a sixth; max_num_seqs=1 packs nothing

The operators have no public name. Where one is missing or fails, the plain matrices stay, and the start-up report says so.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PACKABLE = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """What an `nn.Linear` computes, from a packed weight. The original one can be let go."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight)  # opaque: it can be multiplied, and nothing else
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_linears(model: nn.Module, device: torch.device, max_num_seqs: int) -> str:
    """Replace every `nn.Linear` of a model whose steps have several rows; says what was done, for the start-up report.

    A head that is tied to the embedding is then there twice: 17 MB at 8,192 x 512, 544 MB in Qwen2.5-0.5B.
    """
    first = next(child for child in model.modules() if isinstance(child, nn.Linear))
    if device.type != "cpu" or max_num_seqs == 1 or first.weight.dtype not in PACKABLE:
        return "as in the checkpoint"
    try:  # the trial: what fails here leaves the model as it was
        PackedLinear(first)(torch.ones(2, first.in_features, dtype=first.weight.dtype))
    except (RuntimeError, AttributeError) as error:
        return f"as in the checkpoint: oneDNN does not pack here ({str(error).splitlines()[0]})"
    del first
    for parent in model.modules():
        for name, child in list(parent.named_children()):  # one by one, so that no more than one matrix is there twice
            if isinstance(child, nn.Linear):
                setattr(parent, name, PackedLinear(child))
    return "packed by oneDNN"
