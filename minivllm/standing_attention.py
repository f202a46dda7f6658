"""Lesson 9. On a CPU: the paged gather, done once for a request and not once for a step.

Owns copies of the contexts that are being decoded. A decode step reads every context whole, and all but its newest position
was there a step ago. So decodes of similar length stand together, aligned at their ends, and the first step's gather becomes
copies to which each later step adds one column:

    column  0  1  2  3  4        who ends, or does anything but decode, leaves its place to the last of the group;
    "a"     .  .  0  1  2 <- 3   who comes later is in another group
    "b"     0  1  2  3  4 <- 5

Keys lie across, a position to a column, as a product with a few queries reads them best. The blocks stay the truth, for prefix
hits and after a preemption. Where contexts are longer together than the pool, because they share blocks, there are no copies and
each step gathers; and a group of which less than half is left is made anew, so copies take little more than twice the pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minivllm.attention import AttentionMetadata, DecodeGroup, PagedAttention, gather_kv, slot_mapping

ROOM = 64  # columns by which a copy can grow before it is made anew
PADDING = 2**11  # positions that a group may waste: a second one would cost some 15 small operations a layer, about as much time
GROUP_POSITIONS = 2**15  # the scores of more leave the core's cache


def group_by_padding(seq_lens: list[int]) -> list[list[int]]:
    """Row numbers in groups, longest first. A group is padded to its first, by PADDING positions in all."""
    groups: list[list[int]] = []
    longest = room = 0
    for row in sorted(range(len(seq_lens)), key=lambda row: -seq_lens[row]):
        missing = longest - seq_lens[row]
        if not groups or missing > room or (len(groups[-1]) + 1) * longest > GROUP_POSITIONS:
            groups.append([])
            longest, room, missing = seq_lens[row], PADDING, 0
        groups[-1].append(row)
        room -= missing
    return groups


class StandingGroup(DecodeGroup):
    """B decodes that go on together, and for each layer a copy of their keys (B, K, D, C) and values (B, K, C, D)."""

    def __init__(self, metadata: AttentionMetadata, rows: list[int], cache: PagedAttention) -> None:
        self.members = [(metadata.request_keys[row], metadata.host_seq_lens[row]) for row in rows]  # who, and how far each is
        end = max(length for _, length in self.members)
        before, columns = end - metadata.seq_lens[rows, None], torch.arange(end + ROOM)  # (B, 1), (C,)
        # Where a context has not begun its position 0 is repeated: finite, whatever lies elsewhere.
        positions, self.num_kv_heads = (columns[:end] - before).clamp(min=0), len(cache.key_cache)
        self.slots = slot_mapping(metadata.block_table, torch.tensor(rows)[:, None], positions, cache.block_size)  # (B, end)
        kind = torch.promote_types(cache.kv_cache.dtype, torch.float32)  # a softmax of half types loses too much
        bias = torch.where(columns < before, float("-inf"), 0.0).to(kind)  # (B, C)
        self.all_bias = bias[:, None, None].repeat(1, self.num_kv_heads, 1, 1)  # (B, K, 1, C)
        self.copies: dict[PagedAttention, tuple[Tensor, Tensor]] = {}
        self.stand(metadata, rows, end)

    def stand(self, metadata: AttentionMetadata, rows: list[int], end: int) -> None:
        """In this step the members are in these rows, and column `end` - 1 holds the newest position of each."""
        self.rows, self.end = torch.tensor(rows), end
        self.start = end - max(length for _, length in self.members)  # of the longest context
        self.newest_slots = metadata.slot_mapping[self.rows]  # (B,) in the pool, of each decode's only token
        self.bias = self.all_bias[: len(rows), ..., self.start : end].flatten(0, 1)  # (B * K, 1, S)

    def follow(self, metadata: AttentionMetadata, row_of: dict[int, int]) -> bool:
        """Go on with those who compute exactly their next position, and take them out of `row_of`; False if it is over."""
        for index in reversed(range(len(self.members))):
            key, length = self.members[index]
            if key not in row_of or metadata.host_seq_lens[row_of[key]] != length + 1:
                self.leave(index)
        if 2 * len(self.members) < len(self.all_bias) or self.end == self.all_bias.shape[3]:
            return False  # most of the memory is nobody's, or no column is left
        self.members = [(key, length + 1) for key, length in self.members]
        self.stand(metadata, [row_of.pop(key) for key, _ in self.members], self.end + 1)
        return True

    def leave(self, index: int) -> None:
        """The last member takes the place of this one in every copy."""
        last = self.members.pop()
        if index < len(self.members):
            self.members[index] = last
            for copy in (self.all_bias, *(copy for pair in self.copies.values() for copy in pair)):
                copy[index] = copy[len(self.members)]


class StandingAttention(PagedAttention):
    """`PagedAttention` with the same numbers and fewer copies. The layer that plans a step remembers the groups."""

    standing: Sequence[StandingGroup] = ()

    def plan_decodes(self, metadata: AttentionMetadata) -> list[DecodeGroup]:
        """Keep the groups that go on, and form new ones of the other decodes; all anew when there are twice as many as needed."""
        lens, num_bytes = metadata.host_seq_lens[: metadata.num_decodes], self.kv_cache.itemsize
        if not metadata.request_keys or sum(lens) * max(num_bytes, 4) > self.key_cache.shape[1] * num_bytes:
            self.standing = ()
            return super().plan_decodes(metadata)
        row_of = {key: row for row, key in enumerate(metadata.request_keys[: len(lens)])}
        kept, rest = [group for group in self.standing if group.follow(metadata, row_of)], list(row_of.values())
        new = [[rest[index] for index in group] for group in group_by_padding([lens[row] for row in rest])]
        if len(kept) + len(new) > 2 * len(needed := group_by_padding(lens)):
            kept, new = [], needed
        self.standing = kept + [StandingGroup(metadata, rows, self) for rows in new]
        return list(self.standing)

    def copies(self, group: StandingGroup) -> tuple[Tensor, Tensor]:
        """This layer's keys and values of a group, made now or with the newest column added."""
        if self not in group.copies:
            (count, heads, _, capacity), size = group.all_bias.shape, self.key_cache.shape[2]
            keys = group.all_bias.new_empty(count, heads, size, capacity)
            values = group.all_bias.new_empty(count, heads, capacity, size)
            keys[..., : group.end] = gather_kv(self.key_cache, group.slots).permute(1, 0, 3, 2)  # of (K, B, end, D)
            values[:, :, : group.end] = gather_kv(self.value_cache, group.slots).transpose(0, 1)
            group.copies[self] = keys, values
        else:
            (keys, values), count = group.copies[self], len(group.members)
            newest = self.kv_cache.index_select(2, group.newest_slots)  # (2, K, B, D)
            keys.select(3, group.end - 1)[:count].transpose(0, 1).copy_(newest[0])
            values.select(2, group.end - 1)[:count].transpose(0, 1).copy_(newest[1])
        return keys, values

    def attend_decodes(self, q: Tensor, group: DecodeGroup) -> Tensor:
        """One query each, q (B, H, D)."""
        if not isinstance(group, StandingGroup):
            return super().attend_decodes(q, group)
        count, (keys, values) = len(group.bias), self.copies(group)
        keys = keys.flatten(0, 1)[:count, :, group.start : group.end]  # views: (B * K, D, S)
        values = values.flatten(0, 1)[:count, group.start : group.end]  # (B * K, S, D)
        queries = q.view(count, -1, q.shape[-1]).to(keys.dtype)  # (B * K, H/K, D)
        scores = torch.baddbmm(group.bias, queries, keys, alpha=q.shape[-1] ** -0.5)
        return torch.bmm(scores.softmax(-1), values).view_as(q).to(q.dtype)
