"""Lesson 14. How long sums are cut: into small tiles, so that all of a GPU keeps asking memory for more.

Owns the tiles of the sums that torch.compile writes for steps of one token (`one_token.py`). Such a kernel reads every weight once
and does little else: what counts is how many loads are on their way at any moment. A program that holds much at a time waits for
all of it before it asks again, and few of them fit on a processor. So each takes 512 numbers at a time, four a thread:

    a row of 3,584 weights     512 | 512 | 512 | 512 | 512 | 512 | 512      one program of 128 threads, seven times round

Left alone, torch.compile takes 2,048 numbers of a row, or searches from there (coordinate descent), one step at a time, timing the
kernel alone; that found another place at every start. Microseconds of 7B's four products with one token, in the model on an H200:

    found by search: 130 - 159      512 numbers: 124      four rows of 512: 212      at full bandwidth: 111

Rows that 512 does not divide are left to the search. Those of 0.5B have 896 numbers, or 4,864: the products of a step took 843
microseconds in tiles of 4 x 128 and 2 x 256, and 489 in those of the search.
"""

from __future__ import annotations

from typing import Any

from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.triton import FixedTritonConfig

TILE, NUM_WARPS = 512, 4
FEWEST_SUMS = 256  # fewer are better off with many threads each


class RowTiles(InductorChoices):
    """torch.compile's own choices for everything else."""

    def uuid(self) -> str:
        """For torch's cache: what is compiled depends on these numbers as well."""
        return f"minivllm {TILE} {NUM_WARPS} {FEWEST_SUMS}"

    def triton_kernel_kwargs(self, kernel_cls: Any, features: Any, groups: Any, kernel_kwargs: dict[str, Any]) -> dict[str, Any]:
        """How a kernel is generated. `groups` holds its axes, here {"x": number of sums, "r0_": numbers in each}."""
        kwargs = super().triton_kernel_kwargs(kernel_cls, features, groups, kernel_kwargs)
        axes = groups[0]
        # With several tokens the number of sums is a symbol.
        if set(axes) != {"x", "r0_"} or not all(length.is_number for length in axes.values()):
            return kwargs
        num_sums, length = int(axes["x"]), int(axes["r0_"])
        if num_sums < FEWEST_SUMS or length % TILE:
            return kwargs
        tiles = {"XBLOCK": 1, "R0_BLOCK": TILE, "num_warps": NUM_WARPS, "num_stages": 1}
        return kwargs | {"fixed_config": FixedTritonConfig(tiles), "override_persistent_reduction": False}
