"""Lesson 14. How long sums are cut: so that all of a GPU keeps asking memory for more, and no program ends as it has begun.

Owns the tiles of sums that torch.compile writes, above all for steps of one token (`one_token.py`). Such a kernel reads every
weight once and does little else: what counts is how many loads are on their way at any moment. A program that holds much at a
time waits for all of it before it asks again, and few of them fit on a processor; one that has little to do is over before that
pays, and an H200 begins no more than 820 programs in a microsecond. So a row's length and the number of rows say what it takes:

    at least    rows of                 as in                        a program of 128 threads takes
    768         512 to 1,024 numbers    0.5B: o, gate and up, head   4 whole rows
    65,536      512 to 2,048            1.5B: head                   4 whole rows
    256         a multiple of 512       7B: all                      one row, 512 at a time:    512 | 512 | 512 | ...
    256         1,025 to 8,192          0.5B: down                   one whole row
    256         more than that          1.5B: down                   one row, 1,024 at a time

Whole rows are no loop: what a program loads first, which is weights, is on its way before it waits for the kernel before it to end
(Programmatic Dependent Launch, compiled_model.py). Of gate and up only gate is first. Norms of 7B, of any number of tokens, hold
their row whole. Everything else is left to torch.compile, to its rules and not to its clock (`compiling`). It could search
(coordinate descent), one step at a time and each kernel alone, which takes 12 s of a start or more and finds another place every
time. Milliseconds of a step of one token, 200 positions, on an H200:

    0.5B    left alone 0.76    found by search 0.68 - 0.74    these 0.56
    1.5B    512 numbers, or left alone 1.38                   these 1.27
    7B      found by search 4.1                               these 3.9, the weights at full bandwidth 3.4
"""

from __future__ import annotations

from typing import Any

from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.triton import FixedTritonConfig

WHOLE_ROWS = ((768, 1024), (65_536, 2048))  # at least so many rows, each of up to so many numbers
ROWS_AT_ONCE, TILE, LONG_TILE, LONGEST_WHOLE, NUM_WARPS = 4, 512, 1024, 8192, 4
FEWEST_SUMS = 256  # fewer are better off with many threads each; and rows below TILE are no weights
# A norm's row: torch would time a program that holds all of it and one that reads it in two parts, and take now this, now that.
NORMS, NORM_WARPS = range(2048 + TILE, 4096 + TILE, TILE), 16


def whole(length: int) -> int:
    """A tile that holds a row: a power of two."""
    return 1 << (length - 1).bit_length()


def tiles_of(num_sums: int | None, length: int) -> dict[str, int] | None:
    """What one program takes of `num_sums` rows (None: of any number) of `length` numbers; None leaves it to torch.compile."""
    rows, warps = 1, NUM_WARPS
    if num_sums is None or num_sums < FEWEST_SUMS:
        if length not in NORMS:
            return None
        tile, warps = NORMS[-1], NORM_WARPS
    elif length < TILE:
        return None
    elif any(num_sums >= fewest and length <= longest for fewest, longest in WHOLE_ROWS):
        rows, tile = ROWS_AT_ONCE, whole(length)
    elif length % TILE == 0:
        tile = TILE
    elif length > LONG_TILE:
        tile = whole(length) if length <= LONGEST_WHOLE else LONG_TILE
    else:
        return None
    return {"XBLOCK": rows, "R0_BLOCK": tile, "num_warps": warps, "num_stages": 1}


class WholeRows(FixedTritonConfig):
    """A configuration for a kernel without a loop, which has no R0_BLOCK of its own: torch still asks for it."""

    def __init__(self, config: dict[str, int], tile: int) -> None:
        super().__init__(config)
        self.tile = tile

    def __getitem__(self, item: str) -> int:
        return self.tile if item == "R0_BLOCK" else self.config[item]

    def __contains__(self, item: str) -> bool:
        return item == "R0_BLOCK" or item in self.config


class RowTiles(InductorChoices):
    """torch.compile's own choices for everything else."""

    def uuid(self) -> str:
        """For torch's cache: what is compiled depends on these numbers as well."""
        return f"minivllm {(WHOLE_ROWS, ROWS_AT_ONCE, TILE, LONG_TILE, LONGEST_WHOLE, NUM_WARPS, FEWEST_SUMS, NORMS, NORM_WARPS)}"

    def triton_kernel_kwargs(self, kernel_cls: Any, features: Any, groups: Any, kernel_kwargs: dict[str, Any]) -> dict[str, Any]:
        """How a kernel is generated. `groups` holds its axes, here {"x": number of sums, "r0_": numbers in each}."""
        kwargs = super().triton_kernel_kwargs(kernel_cls, features, groups, kernel_kwargs)
        axes = groups[0]
        if set(axes) != {"x", "r0_"} or not axes["r0_"].is_number:
            return kwargs
        num_sums = int(axes["x"]) if axes["x"].is_number else None  # with several tokens it is a symbol
        if (tiles := tiles_of(num_sums, int(axes["r0_"]))) is None:
            return kwargs
        if tiles["R0_BLOCK"] < int(axes["r0_"]) or tiles["num_warps"] == NORM_WARPS:
            return kwargs | {"fixed_config": FixedTritonConfig(tiles), "override_persistent_reduction": False}
        tile = tiles.pop("R0_BLOCK")
        return kwargs | {"fixed_config": WholeRows(tiles, tile), "override_persistent_reduction": True}
