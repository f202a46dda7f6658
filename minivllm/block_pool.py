"""Lesson 7. The block pool: KV memory as numbered pages, and nobody cares which number comes next.

Owns which block is free, how many requests hold each one, and which content each one is known to have. Never touches a
tensor or a request: a block here is a number, its content an opaque hashable (`kv_cache.BlockHash` in the engine).

    taken from the left                                  given back
    free queue:  [ 7 | 2 | 9 | 4* | 1* | 5* ]            without a hash: to the front, reused first
                   no use  oldest*    newest*            with a hash (*): to the back, so that it can still be hit

A hash outlives its request: a free block keeps its content until the moment somebody else takes it. That is the whole
prefix cache: there is no second store, and it takes no memory from running requests.
vLLM: vllm/v1/core/block_pool.py, with a linked list of its own (kv_cache_utils.py) where this has an OrderedDict.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable

NULL_BLOCK = 0  # padded tokens write here and unused table entries point here; never handed out


class BlockPool:
    """Blocks 1 .. num_blocks - 1, each of them free or referenced. These hold between any two calls:

        free + referenced == num_blocks - 1
        block in free_queue            <=>  ref_counts[block] == 0         (block 0 apart)
        block in cached_blocks[hash]   <=>  block_hashes[block] == hash

    Two blocks may have the same hash: tables only grow at the end, so a request that computed what another one
    also computed keeps its own copy (vLLM does not merge them either).
    """

    def __init__(self, num_blocks: int, enable_caching: bool = True) -> None:
        assert num_blocks >= 2, f"a pool of {num_blocks} blocks has none to hand out: block 0 is the null block"
        self.num_blocks = num_blocks
        self.enable_caching = enable_caching
        self.ref_counts = [0] * num_blocks  # how many block tables hold each block
        # Ordered, and O(1) at both ends and in the middle: Python's linked list with a dict over it. Values mean nothing.
        self.free_queue: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self.block_hashes: dict[int, Hashable] = {}
        self.cached_blocks: dict[Hashable, dict[int, None]] = {}  # the inner dict is an ordered set

    def get_num_free_blocks(self) -> int:
        return len(self.free_queue)

    def get_new_blocks(self, num_blocks: int) -> list[int]:
        """Take this many blocks from the left of the free queue, each with one reference, and return their ids.

        A block that still has a hash loses it now (`evict`), and not before: until this moment a hit could bring it back.
        The caller has made sure that enough blocks are free; asking for more is its mistake: nothing is taken, and an assert
        says so with both numbers.
        """
        assert num_blocks <= len(self.free_queue), f"{num_blocks} blocks wanted, {len(self.free_queue)} free"
        block_ids = []
        for _ in range(num_blocks):
            block_id, _ = self.free_queue.popitem(last=False)
            self.evict(block_id)
            self.ref_counts[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def touch(self, block_ids: Iterable[int]) -> None:
        """Add one reference to each block. One that was free leaves the queue, from wherever it stood, hash and all."""
        for block_id in block_ids:
            if self.ref_counts[block_id] == 0:
                del self.free_queue[block_id]
            self.ref_counts[block_id] += 1

    def free_blocks(self, block_ids: Iterable[int]) -> None:
        """Drop one reference from each block, in the order given. A block that nobody holds any more joins the free queue.

        With a hash it goes to the back, so that it stays findable for as long as possible. Without one nobody can ever
        ask for its content, so it goes to the front. Callers give a request's last block first: then the tail of a
        sequence is evicted before its head, and what is left of it is still a prefix. To free a block that nobody holds is
        the caller's mistake, and an assert says so with the block's number.
        """
        for block_id in block_ids:
            assert self.ref_counts[block_id] > 0, f"block {block_id} is freed, and no table holds it"
            self.ref_counts[block_id] -= 1
            if self.ref_counts[block_id] == 0:
                self.free_queue[block_id] = None
                if block_id not in self.block_hashes:
                    self.free_queue.move_to_end(block_id, last=False)

    def get_cached_block(self, block_hash: Hashable) -> int | None:
        """Return a block with this content, held or free, or None. The caller touches it before it takes new blocks."""
        blocks = self.cached_blocks.get(block_hash)
        return next(iter(blocks)) if blocks else None

    def cache_block(self, block_id: int, block_hash: Hashable) -> None:
        """Publish: from now on the block can be found by this hash. It must be held, full, and not published yet."""
        assert self.ref_counts[block_id] > 0, f"block {block_id} is free: a request publishes only blocks that it holds"
        assert block_id not in self.block_hashes, f"block {block_id} is published already"
        if self.enable_caching:
            self.block_hashes[block_id] = block_hash
            self.cached_blocks.setdefault(block_hash, {})[block_id] = None

    def evict(self, block_id: int) -> None:
        """Forget the block's content, if it is known. A twin with the same content stays findable."""
        block_hash = self.block_hashes.pop(block_id, None)
        if block_hash is not None:
            del self.cached_blocks[block_hash][block_id]
            if not self.cached_blocks[block_hash]:
                del self.cached_blocks[block_hash]

    def reset_prefix_cache(self) -> bool:
        """Forget every content, say after new weights were loaded. False, and nothing done, while a request holds a block."""
        if len(self.free_queue) != self.num_blocks - 1:
            return False
        self.block_hashes.clear()
        self.cached_blocks.clear()
        return True

    def check(self) -> None:
        """Assert the invariants of the class. O(blocks): for tests and debugging."""
        free, referenced = len(self.free_queue), sum(count > 0 for count in self.ref_counts)
        assert free + referenced == self.num_blocks - 1, (
            f"free blocks: {free}, held blocks: {referenced}, and the pool has {self.num_blocks - 1}")
        assert min(self.ref_counts) >= 0, f"block {self.ref_counts.index(min(self.ref_counts))} was freed more often than held"
        assert self.ref_counts[NULL_BLOCK] == 0 and NULL_BLOCK not in self.free_queue, "the null block was handed out or freed"
        held = [block_id for block_id in self.free_queue if self.ref_counts[block_id]]
        assert not held, f"block {held[0]} lies in the free queue and has {self.ref_counts[held[0]]} references"
        listed = [(block_id, block_hash) for block_hash, blocks in self.cached_blocks.items() for block_id in blocks]
        assert len(listed) == len(self.block_hashes) and dict(listed) == self.block_hashes, (
            f"{len(listed)} blocks are listed under a hash and {len(self.block_hashes)} have one, or not the same ones")
        assert all(self.cached_blocks.values()), "a hash without blocks is left in the map"
