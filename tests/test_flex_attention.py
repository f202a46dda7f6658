"""The block mask of a decode step says what the block table says; the kernel itself is tested on a GPU (test_gpu_graphs.py)."""

from __future__ import annotations

import torch
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from minivllm.flex_attention import make_decode_metadata


def visible_slots(positions: list[int], tables: list[list[int]], block_size: int) -> tuple[list[set[int]], list[int]]:
    """Which slots each request sees: those of its listed blocks that the mask lets through. And where each token goes."""
    num_slots = (max(max(table) for table in tables) + 1) * block_size
    metadata = make_decode_metadata(torch.tensor(positions, dtype=torch.int32), torch.tensor(tables, dtype=torch.int32),
                                    block_size, num_slots, group=7)
    mask, zero = metadata.block_mask, torch.tensor(0)
    seen = []
    for row in range(len(positions)):
        listed = mask.kv_indices[row, 0, 0, : int(mask.kv_num_blocks[row, 0, 0])].tolist()
        slots = [block * block_size + offset for block in listed for offset in range(block_size)]
        shown = [bool(mask.mask_mod(torch.tensor(row), zero, zero, torch.tensor(slot, dtype=torch.int32))) for slot in slots]
        seen.append({slot for slot, is_shown in zip(slots, shown) if is_shown})
    return seen, metadata.slot_mapping.tolist()


@settings(max_examples=examples(60))
@given(st.integers(0, 9999), st.integers(1, 4), st.sampled_from([2, 16]), st.integers(1, 3))
def test_a_decode_sees_its_own_positions_and_nothing_else(seed, num_requests, block_size, num_blocks):
    """Each request sees exactly the slots of positions 0 to its own, wherever its blocks lie, and writes into the last of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.randperm(num_requests * num_blocks, generator=generator) + 1).view(num_requests, num_blocks).tolist()
    positions = torch.randint(num_blocks * block_size, (num_requests,), generator=generator).tolist()
    seen, written = visible_slots(positions, ids, block_size)
    for row, position in enumerate(positions):
        slots = [ids[row][p // block_size] * block_size + p % block_size for p in range(position + 1)]
        assert seen[row] == set(slots), f"request {row} at position {position} sees {sorted(seen[row])}, not {sorted(slots)}"
        assert written[row] == slots[-1], f"request {row} writes slot {written[row]}, not {slots[-1]}"


def test_t23_a_padded_row_lives_in_the_null_block():
    """Position 0 and a table of null blocks, as padding has them, read and write slot 0 alone."""
    seen, written = visible_slots([0, 17], [[0, 0], [1, 2]], 16)
    assert (seen[0], written[0]) == ({0}, 0)
