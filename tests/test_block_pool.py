"""Lesson 7: blocks are handed out, shared and given back, and none is ever lost or owned by two who do not know it."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from telling import refused, told_as

from minivllm.block_pool import NULL_BLOCK, BlockPool

OPS = st.lists(st.tuples(st.sampled_from(["get", "free", "share", "publish", "find"]), st.integers(0, 7)), max_size=40)
STALE = [("get", 1), ("publish", 0), ("free", 0), ("get", 1), ("find", 0)]  # a content that its block has no more


class ToldPool:
    """A pool that writes down what it is asked for, and what it answers."""

    def __init__(self, num_blocks: int) -> None:
        self.pool, self.calls = BlockPool(num_blocks), [f"BlockPool({num_blocks})"]

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(f"{name}({', '.join(map(repr, arguments))})")
            answer = getattr(self.pool, name)(*arguments)
            self.calls[-1] += "" if answer is None else f" -> {answer}"
            return answer

        return call


def play(told, op, number, owned, contents):
    """One operation on the pool, and on a list that has a block once for each owner."""
    content, block_id = f"content {number % 3}", owned[number % len(owned)] if owned else None
    if op == "get" and number <= told.pool.get_num_free_blocks():
        new = told.get_new_blocks(number)
        assert len(new) == number, f"get_new_blocks({number}) gives {new}"
        assert not set(new) & set(owned), f"blocks {new} are handed out, and {owned} are owned already"
        owned += new
        contents |= dict.fromkeys(new)  # a new owner writes: what was in it is gone
    elif op == "free" and owned:
        told.free_blocks([owned.pop(number % len(owned))])
    elif op == "share" and owned:
        told.touch([block_id])
        owned.append(block_id)
    elif op == "publish" and owned and contents[block_id] is None:
        contents[block_id] = content
        told.cache_block(block_id, content)
    elif op == "find" and (block_id := told.get_cached_block(content)) is not None:
        held = contents[block_id] or "what its new owner writes"
        assert held == content, f"a hit on {content!r} finds block {block_id}, which holds {held}"
        told.touch([block_id])
        owned.append(block_id)


@given(st.integers(2, 6), OPS)
@example(2, STALE)
def test_every_block_is_free_or_owned(num_blocks, ops):
    """Played against a plain list of owners, the pool never loses a block, hands one out twice or finds a wrong content."""
    told, owned, contents = ToldPool(num_blocks), [], {}
    with told_as(told.calls):
        for op, number in ops:
            play(told, op, number, owned, contents)
            told.pool.check()
            free, expected = told.pool.get_num_free_blocks(), num_blocks - 1 - len(set(owned))
            assert free == expected, f"blocks {sorted(set(owned))} are owned, of 1 to {num_blocks - 1}, and {free} are free"


def test_the_null_block_is_never_handed_out():
    """Block 0 takes what nobody reads, so no request may own it."""
    pool = BlockPool(4)
    assert sorted(pool.get_new_blocks(3)) == [1, 2, 3], "three of four blocks can be owned"
    assert NULL_BLOCK == 0
    with refused("free_blocks([0])", 0):
        pool.free_blocks([NULL_BLOCK])


def test_blocks_are_taken_from_the_left():
    """New blocks are those at the left of the free queue, the leftmost first."""
    pool = BlockPool(5)
    taken = [pool.get_new_blocks(2), pool.get_new_blocks(2)]
    assert taken == [[1, 2], [3, 4]], (
        f"of a free queue 1, 2, 3, 4 two requests for 2 blocks take {taken} instead of [[1, 2], [3, 4]]")


def test_a_block_without_a_name_is_reused_first():
    """A block without a hash goes to the front of the free queue: nobody can ask for its content."""
    pool = BlockPool(5)
    pool.free_blocks(pool.get_new_blocks(2))
    queue = list(pool.free_queue)
    assert queue == [2, 1, 3, 4], (
        f"blocks 1 and 2 are freed in this order, each to the front of 3, 4: the queue is {queue} instead of [2, 1, 3, 4]")


def test_a_block_with_a_name_is_kept_longest():
    """A block with a hash goes to the back of the free queue: freed tail first, a sequence loses its tail before its head."""
    pool = BlockPool(5)
    head, tail = pool.get_new_blocks(2)
    pool.cache_block(head, "head")
    pool.cache_block(tail, "head and tail")
    pool.free_blocks([tail, head])
    queue = list(pool.free_queue)
    assert queue == [3, 4, tail, head], (
        f"the tail {tail}, then the head {head}, go to the back of 3, 4: the queue is {queue} instead of {[3, 4, tail, head]}")


def test_a_hash_is_lost_only_when_the_block_is_taken():
    """A free block can still be hit until it is handed out anew, and then its hash is gone."""
    pool = BlockPool(3)
    pool.get_new_blocks(1)
    pool.cache_block(1, "story")
    pool.free_blocks([1])
    for _ in range(2):
        found = pool.get_cached_block("story")
        assert found == 1, f"with {pool.get_num_free_blocks()} blocks free, nobody has taken block 1 yet, and a hit finds {found}"
        (taken,) = pool.get_new_blocks(1)
    found = pool.get_cached_block("story")
    assert found is None, f"block {taken} has a new owner, who writes something else, and a hit still finds block {found}"


def test_a_hit_takes_a_free_block_out_of_the_middle_of_the_queue():
    """A free block that is touched leaves the free queue, and the next allocation cannot take it."""
    pool = BlockPool(4)
    pool.get_new_blocks(2)
    pool.cache_block(2, "story")
    pool.free_blocks([2, 1])
    assert list(pool.free_queue) == [1, 3, 2], f"before the touch the queue is {list(pool.free_queue)} instead of [1, 3, 2]"
    pool.touch([2])
    assert list(pool.free_queue) == [1, 3], f"block 2 is touched, and the free queue is {list(pool.free_queue)} instead of [1, 3]"
    assert pool.ref_counts[2] == 1, f"block 2 is touched once and counts {pool.ref_counts[2]} references"
    pool.check()


def test_t04_two_blocks_with_one_content_live_side_by_side():
    """Of two blocks with the same content each can be found: when one is evicted the other is still there, and nothing leaks."""
    pool = BlockPool(4)
    pool.get_new_blocks(2)
    pool.cache_block(1, "story")
    pool.cache_block(2, "story")
    assert pool.get_cached_block("story") == 1, f"of blocks 1 and 2 a hit finds {pool.get_cached_block('story')}, not the first"
    pool.evict(1)
    found = pool.get_cached_block("story")
    assert found == 2, f"block 1 is evicted, its twin 2 is not, and a hit finds {found}"
    pool.free_blocks([1, 2])
    pool.check()
    pool.get_new_blocks(3)
    found = pool.get_cached_block("story")
    assert found is None, f"all 3 blocks have new owners, and a hit finds block {found}"
    pool.check()


def test_t05_a_shared_block_is_free_when_its_last_owner_leaves():
    """Freeing a block gives up one reference, and the block is free when it was the last one."""
    pool = BlockPool(3)
    block_ids = pool.get_new_blocks(1)
    pool.touch(block_ids)
    pool.free_blocks(block_ids)
    free = pool.get_num_free_blocks()
    assert free == 1, f"its second owner still reads block 1 of 2, and {free} blocks are free"
    pool.free_blocks(block_ids)
    free = pool.get_num_free_blocks()
    assert free == 2, f"both owners have left block 1 of 2, and {free} are free"


def test_t05_a_double_free_is_our_mistake_and_says_so():
    """Freeing a block that nobody holds stops at once, with an assert that names the block."""
    pool = BlockPool(3)
    block_ids = pool.get_new_blocks(1)
    pool.free_blocks(block_ids)
    with refused("the second free_blocks([1]) after one get_new_blocks(1)", 1):
        pool.free_blocks(block_ids)


def test_asking_for_more_than_is_free_is_our_mistake_and_says_so():
    """Asking for more blocks than are free stops at once, with an assert that names both numbers, and takes none."""
    pool = BlockPool(3)
    with refused("get_new_blocks(3) with 2 blocks free", 3, 2):
        pool.get_new_blocks(3)
    assert pool.get_num_free_blocks() == 2, f"3 of 2 blocks were refused, and {pool.get_num_free_blocks()} are free now"


def test_only_held_blocks_are_published_and_only_once():
    """A name is given by an owner: a free block's content may change at any moment."""
    pool = BlockPool(3)
    with pytest.raises(AssertionError, match="block 1 is free"):
        pool.cache_block(1, "story")
    pool.get_new_blocks(1)
    pool.cache_block(1, "story")
    with pytest.raises(AssertionError, match="published already"):
        pool.cache_block(1, "another story")


def test_reset_forgets_every_content_when_nobody_holds_a_block():
    """New weights make all cached KV wrong; while a request runs on the old ones the answer is False."""
    pool = BlockPool(3)
    pool.get_new_blocks(1)
    pool.cache_block(1, "story")
    assert not pool.reset_prefix_cache(), "block 1 is in use"
    assert pool.get_cached_block("story") == 1
    pool.free_blocks([1])
    assert pool.reset_prefix_cache()
    assert pool.get_cached_block("story") is None
    pool.check()


def test_without_caching_nothing_is_ever_found():
    """With the prefix cache off, publishing has no effect."""
    pool = BlockPool(3, enable_caching=False)
    pool.get_new_blocks(1)
    pool.cache_block(1, "story")
    assert pool.get_cached_block("story") is None
    pool.check()


@pytest.mark.parametrize("damage", [
    lambda pool: pool.free_queue.popitem(),  # a block is lost
    lambda pool: pool.free_queue.update({1: None}),  # held and free
    lambda pool: pool.free_queue.update({0: None}),
    lambda pool: pool.cached_blocks.clear(),
    lambda pool: pool.cached_blocks.update({"no block": {}}),
    lambda pool: pool.cached_blocks.update({"another story": {1: None}}),
    lambda pool: pool.ref_counts.__setitem__(1, -1),
])
def test_check_finds_damage(damage):
    """The invariants are written as equations, and `check` does see when one is broken."""
    pool = BlockPool(4)
    pool.get_new_blocks(1)
    pool.cache_block(1, "story")
    pool.check()
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check()
