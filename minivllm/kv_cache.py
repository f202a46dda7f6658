"""Lessons 7 and 11. Which blocks a request owns, and which it need not fill because somebody computed the same prefix.

Owns every block table and is the only caller of the block pool. Never touches a tensor or a queue. Position p of a request
lives in block `table[p // block_size]`, at offset `p % block_size`, and tables only grow at the end.

    tokens    [ T h e  c ] [ a t  s a ] [ t . ]           a full block's name is a hash chained to its parent's name:
    table          4            1          7              the same 4 tokens after another beginning are another block
    names        h(-, ..)  <-  h(., ..)    none yet       and a partial block has no name

vLLM: vllm/v1/core/kv_cache_manager.py and kv_cache_utils.py; groups of layers with several kinds of cache are left out here.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from minivllm.block_pool import BlockPool
from minivllm.request import Request


class BlockHash(NamedTuple):
    """A full block's name: a digest of the whole sequence up to its end, and what went into the digest.

    A dict finds an entry by the digest and then compares all four fields, so even two contents with one digest stay two.
    """

    digest: bytes
    parent_digest: bytes
    token_ids: bytes  # 8 of them each
    extra_keys: tuple[str, ...]

    def __hash__(self) -> int:
        return hash(self.digest)


NO_PARENT = b"\0" * 32  # the parent digest of a sequence's first block


def hash_block_tokens(parent: BlockHash | None, token_ids: Sequence[int], extra_keys: tuple[str, ...] = ()) -> BlockHash:
    """Name a full block: sha256 of its parent's digest (`NO_PARENT` for a first block), its token ids and its extra keys.

    The parent makes it a chain: equal names mean equal tokens from position 0 to the end of the block. Extra keys are
    whatever else changes the KV or must keep it apart: a cache salt today, the name of a LoRA adapter later.
    """
    parent_digest = parent.digest if parent else NO_PARENT
    content = array("q", token_ids).tobytes()
    digest = hashlib.sha256(parent_digest + content + repr(extra_keys).encode()).digest()
    return BlockHash(digest, parent_digest, content, extra_keys)


def extra_keys_of(request: Request, block_index: int) -> tuple[str, ...]:
    """What besides tokens names a block. A salt in the first block is enough: the chain carries it to all others."""
    return (request.cache_salt,) if block_index == 0 and request.cache_salt is not None else ()


def find_longest_cache_hit(pool: BlockPool, block_hashes: Sequence[BlockHash], num_tokens: int, block_size: int) -> list[int]:
    """Return the ids of the cached blocks that a sequence of `num_tokens` can start from: its longest known prefix.

    `block_hashes` are the names of its full blocks, in order; the first one that the pool does not know ends the prefix.
    At most `num_tokens - 1` tokens are covered: the last one is computed in any case, or there were no logits to sample
    from. So when every block of a sequence without a partial block is known, the last block is computed again.
    """
    block_ids: list[int] = []
    for block_hash in block_hashes[:(num_tokens - 1) // block_size]:
        block_id = pool.get_cached_block(block_hash)
        if block_id is None:
            break
        block_ids.append(block_id)
    return block_ids


class KVCacheManager:
    """Every resident request's block table, over one pool. These hold between any two calls:

        ref_counts[block] == number of tables that hold the block
        slots of a request = len(table) * block_size >= num_computed_tokens
        the first num_cached_blocks of a table have a name: prefix hits, and blocks published since
    """

    def __init__(self, num_blocks: int, block_size: int, enable_caching: bool, max_model_len: int) -> None:
        self.pool = BlockPool(num_blocks, enable_caching)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_caching = enable_caching
        self.max_model_len = max_model_len
        self.block_tables: dict[str, list[int]] = {}
        self.num_cached_blocks: dict[str, int] = {}

    @property
    def num_free_blocks(self) -> int:
        return self.pool.get_num_free_blocks()

    @property
    def usage(self) -> float:
        """The share of the pool that requests hold, 0 to 1. Cached blocks that nobody holds count as free."""
        return 1 - self.num_free_blocks / (self.num_blocks - 1)

    def get_block_ids(self, request_id: str) -> list[int]:
        """A copy of the request's table: what a step was given must not change when the table grows."""
        return list(self.block_tables.get(request_id, ()))

    def get_computed_blocks(self, request: Request) -> tuple[list[int], int]:
        """The cached blocks a waiting request can start from, and how many tokens they hold. Nothing changes.

        A request that wants prompt_logprobs gets none: logits of cached positions were never kept.
        """
        if not self.reads_cache(request):
            return [], 0
        self.name_full_blocks(request, request.num_tokens)
        block_ids = find_longest_cache_hit(self.pool, request.block_hashes, request.num_tokens, self.block_size)
        return block_ids, len(block_ids) * self.block_size

    def reads_cache(self, request: Request) -> bool:
        return self.enable_caching and request.sampling_params.prompt_logprobs is None

    def num_blocks_to_take(self, request: Request, num_tokens: int, new_computed_blocks: Sequence[int] = ()) -> int:
        """How many free blocks it costs the request to own slots for `num_tokens` positions.

        A hit that lies in the free queue costs one as well: it cannot be a hit and somebody's new block.
        """
        num_owned = len(self.block_tables.get(request.request_id, ())) + len(new_computed_blocks)
        num_missing = max(0, -(-num_tokens // self.block_size) - num_owned)
        return num_missing + sum(self.pool.ref_counts[block_id] == 0 for block_id in new_computed_blocks)

    def allocate_slots(self, request: Request, num_new_tokens: int, num_lookahead_tokens: int = 0, *,
                       new_computed_blocks: Sequence[int] = (), full_sequence_must_fit: bool = False) -> list[int] | None:
        """Own slots for the next `num_new_tokens` positions: return the ids of the new blocks, or None having changed nothing.

        At admission `new_computed_blocks` are the hits, which head the table. `full_sequence_must_fit` refuses a request
        whose known tokens would not all fit, without reserving room for them: it would only be preempted before its first
        token. Lookahead slots are for drafts (lesson 12) and end at max_model_len.
        """
        table = self.block_tables.get(request.request_id)
        assert not (new_computed_blocks and table), "prefix hits come first in a table"
        num_tokens = request.num_computed_tokens + num_new_tokens + num_lookahead_tokens
        if table and num_tokens <= len(table) * self.block_size:
            return []  # most decode steps: the newest block has room
        num_tokens = min(num_tokens + len(new_computed_blocks) * self.block_size, self.max_model_len)
        num_must_fit = max(num_tokens, request.num_tokens) if full_sequence_must_fit else num_tokens
        if self.num_blocks_to_take(request, num_must_fit, new_computed_blocks) > self.num_free_blocks:
            return None
        self.pool.touch(new_computed_blocks)  # before anything is taken, or a hit could be handed out as a new block
        table = self.block_tables.setdefault(request.request_id, list(new_computed_blocks))
        self.num_cached_blocks.setdefault(request.request_id, len(new_computed_blocks))
        new_blocks = self.pool.get_new_blocks(-(-num_tokens // self.block_size) - len(table))
        table += new_blocks
        return new_blocks

    def cache_blocks(self, request: Request, num_tokens: int) -> list[int]:
        """Publish the request's blocks that its first `num_tokens` positions fill, if they are not; return their ids.

        The caller vouches for those positions: their tokens are known, and their KV is written before anybody reads it.
        A step may publish what it is about to compute, because each layer writes the whole batch before it reads.
        """
        first, last = self.num_cached_blocks[request.request_id], num_tokens // self.block_size
        if last <= first or not self.enable_caching:
            return []
        assert num_tokens <= request.num_tokens, f"{num_tokens} positions to publish, {request.num_tokens} tokens known"
        self.name_full_blocks(request, num_tokens)
        block_ids = self.block_tables[request.request_id][first:last]
        for block_id, block_hash in zip(block_ids, request.block_hashes[first:last], strict=True):
            self.pool.cache_block(block_id, block_hash)
        self.num_cached_blocks[request.request_id] = last
        return block_ids

    def name_full_blocks(self, request: Request, num_tokens: int) -> None:
        """Extend `request.block_hashes` over the full blocks among `num_tokens`. Each is hashed once in a request's life: a
        prompt's when it arrives, as a step that has many to admit could not begin before all of them were hashed.
        """
        hashes, size = request.block_hashes, self.block_size
        for index in range(len(hashes), num_tokens // size if self.enable_caching else 0):
            token_ids = request.all_token_ids[index * size:(index + 1) * size]
            hashes.append(hash_block_tokens(hashes[-1] if hashes else None, token_ids, extra_keys_of(request, index)))

    def uncache(self, block_ids: Iterable[int]) -> None:
        """Take back names that a failed step gave: the KV behind them was perhaps never written."""
        for block_id in block_ids:
            self.pool.evict(block_id)

    def truncate(self, request: Request, num_tokens: int) -> None:
        """Give back the blocks beyond the first `num_tokens` positions, last first: slots that drafts did not need.

        Published blocks are never cut: somebody may have hit them.
        """
        num_blocks = -(-num_tokens // self.block_size)
        table, num_cached = self.block_tables[request.request_id], self.num_cached_blocks[request.request_id]
        assert num_tokens >= num_cached * self.block_size, f"cut to {num_tokens} tokens while {num_cached} blocks are published"
        self.pool.free_blocks(reversed(table[num_blocks:]))
        del table[num_blocks:]

    def free(self, request: Request) -> None:
        """Give all the request's blocks back, last first. Names stay, so a preempted request often finds its own again."""
        self.pool.free_blocks(reversed(self.block_tables.pop(request.request_id, [])))
        self.num_cached_blocks.pop(request.request_id, None)

    def reset_prefix_cache(self) -> bool:
        """Forget every cached block; False, and nothing done, while a request holds one."""
        return self.pool.reset_prefix_cache()

    def check(self) -> None:
        """Assert the invariants of this class and of the pool. O(blocks): for tests and debugging."""
        self.pool.check()
        holders = Counter(block_id for table in self.block_tables.values() for block_id in table)
        for block_id, count in enumerate(self.pool.ref_counts):
            in_tables = holders[block_id]
            assert count == in_tables, f"block {block_id} counts {count} references and is in {in_tables} tables"
        for request_id, table in self.block_tables.items():
            assert len(set(table)) == len(table), f"request {request_id} holds a block twice: {table}"
        assert self.block_tables.keys() == self.num_cached_blocks.keys(), "a table without a count of its published blocks"
