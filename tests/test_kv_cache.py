"""Lessons 7 and 11: block tables, and prefixes that are found again by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from telling import refused

from minivllm import kv_cache
from minivllm.block_pool import BlockPool
from minivllm.kv_cache import KVCacheManager, find_longest_cache_hit, hash_block_tokens
from minivllm.request import Request
from minivllm.sampling_params import SamplingParams


def make_request(request_id, token_ids, **arguments):
    params = SamplingParams(prompt_logprobs=arguments.pop("prompt_logprobs", None))
    return Request(request_id, token_ids, params, **arguments)


def admit(manager, request):
    """Compute and publish all of a request's tokens, as a scheduler with a large budget would. Returns its prefix hits."""
    hits, num_hits = manager.get_computed_blocks(request)
    assert manager.allocate_slots(request, request.num_tokens - num_hits, new_computed_blocks=hits) is not None, "no room"
    request.num_computed_tokens = request.num_tokens
    manager.cache_blocks(request, request.num_tokens)
    manager.check()
    return hits


def leave(manager, request):
    manager.free(request)
    request.num_computed_tokens = 0
    manager.check()


def test_a_name_covers_everything_from_the_first_token():
    """Blocks with equal names have equal tokens from the first on: the same block behind another beginning has another name."""
    first, other = hash_block_tokens(None, [1, 2]), hash_block_tokens(None, [2, 1])
    assert first == hash_block_tokens(None, [1, 2]), "the block [1, 2] is named twice, and the names differ"
    assert first.digest != other.digest, "[1, 2] and [2, 1] have one digest"
    parents = {"nothing": None, "[1, 2]": first, "[2, 1]": other}
    names = {text: hash_block_tokens(parent, [7, 7]).digest for text, parent in parents.items()}
    assert len(set(names.values())) == 3, f"[7, 7] behind {', '.join(names)} has {len(set(names.values()))} digests, not 3"


def test_tokens_are_not_run_together_in_a_name():
    """Two blocks of different tokens have different names, also where their digits are the same: [1, 23] and [12, 3]."""
    for one, other in (([1, 23], [12, 3]), ([1, 256], [257, 0]), ([0, 0], [0])):
        assert hash_block_tokens(None, one).digest != hash_block_tokens(None, other).digest, f"{one} and {other} have one digest"


def test_extra_keys_keep_equal_tokens_apart():
    """A salt (or later an adapter) makes other names of equal tokens, in the block that has it and in all behind it."""
    plain, salted = hash_block_tokens(None, [1, 2]), hash_block_tokens(None, [1, 2], ("salt",))
    assert plain.digest != salted.digest, "[1, 2] has one digest with and without a salt"
    behind = [hash_block_tokens(parent, [3, 4]).digest for parent in (plain, salted)]
    assert behind[0] != behind[1], "[3, 4] has one digest behind a block with a salt and behind one without"


@given(st.lists(st.integers(0, 1), max_size=12), st.lists(st.integers(0, 1), min_size=1, max_size=12), st.integers(1, 4))
def test_the_hit_is_the_longest_common_beginning_in_whole_blocks(cached, wanted, size):
    """The hit is what a slow count finds: blocks that are equal from the left on, without the one that has the last token."""
    def names(token_ids):
        result = []
        for start in range(0, len(token_ids) - size + 1, size):
            result.append(hash_block_tokens(result[-1] if result else None, token_ids[start:start + size]))
        return result

    pool = BlockPool(14)
    for block_id, name in zip(pool.get_new_blocks(13), names(cached)):
        pool.cache_block(block_id, name)
    expected = 0
    while (expected + 1) * size <= min(len(cached), len(wanted) - 1) and (
            cached[:(expected + 1) * size] == wanted[:(expected + 1) * size]):
        expected += 1
    hits = find_longest_cache_hit(pool, names(wanted), len(wanted), size)
    assert hits == list(range(1, expected + 1)), (
        f"{wanted} finds {hits} of {cached} in blocks of {size} instead of {list(range(1, expected + 1))}")


def test_a_gap_ends_the_prefix():
    """What stands behind a block that is gone cannot be used: its positions would attend to nothing."""
    pool, first = BlockPool(4), hash_block_tokens(None, [1])
    second = hash_block_tokens(first, [2])
    pool.get_new_blocks(2)
    pool.cache_block(2, second)
    hits = find_longest_cache_hit(pool, [first, second], 3, 1)
    assert hits == [], f"the first block is not cached, the second is: the prefix has no block, not {hits}"


def test_t01_a_hash_dies_with_the_block_it_named():
    """The smallest wrong-KV story: A runs and leaves, B reuses its block, and C must not read B's."""
    manager = KVCacheManager(4, 2, True, 16)  # three blocks: exactly what each of them needs
    a = make_request("A", [1, 1, 0, 0, 9])
    admit(manager, a)
    leave(manager, a)
    b = make_request("B", [2, 2, 0, 0])
    assert admit(manager, b) == [], "B begins otherwise, so its [0, 0] is not A's"
    leave(manager, b)
    c = make_request("C", [1, 1, 0, 0, 9])
    assert manager.get_computed_blocks(c) == ([1], 2), "A's first block is left; its second was B's, and holds B's [0, 0] or [2, 2]"


def test_t03_a_known_prompt_computes_its_last_token():
    """A prompt of whole blocks, all of them cached, still computes one block: without it there are no logits."""
    for num_tokens, num_hits in ((3, 2), (4, 2), (5, 4)):
        manager = KVCacheManager(8, 2, True, 16)
        admit(manager, make_request("A", list(range(5))))
        _, found = manager.get_computed_blocks(make_request("B", list(range(num_tokens))))
        assert found == num_hits, (
            f"{num_tokens} known tokens in blocks of 2: {found} are taken from the cache instead of {num_hits}")


def test_t06_a_hit_is_not_evicted_to_make_room_for_its_own_request():
    """A hit that lies at the very left of the free queue is not taken for the new block of the request that has hit it."""
    manager = KVCacheManager(3, 2, True, 16)
    a = make_request("A", [1, 1])
    admit(manager, a)
    leave(manager, a)
    manager.pool.free_queue.move_to_end(1, last=False)
    b = make_request("B", [1, 1, 5])
    hits, table = admit(manager, b), manager.get_block_ids("B")
    assert hits == [1], f"block 1 holds [1, 1] and should be a hit: the hits are {hits}"
    assert table == [1, 2], f"block 1 is hit and 2 is new: the table is {table} instead of [1, 2]"


def test_t07_a_hit_in_the_free_queue_takes_room():
    """Two blocks free, one of them a hit: there is one to take, not two, and a refusal changes nothing."""
    manager = KVCacheManager(3, 2, True, 16)
    a = make_request("A", [1, 1])
    admit(manager, a)
    leave(manager, a)
    b = make_request("B", [1, 1, 5, 5, 5])
    hits, num_hits = manager.get_computed_blocks(b)
    need = manager.num_blocks_to_take(b, 5, hits)
    assert need == 3, f"5 tokens in blocks of 2, one of them a hit that is free: {need} free blocks are said to be taken, not 3"
    before = (list(manager.pool.free_queue), dict(manager.pool.block_hashes), list(manager.pool.ref_counts))
    taken = manager.allocate_slots(b, 5 - num_hits, new_computed_blocks=hits)
    assert taken is None, f"3 blocks are needed, 2 are free, and {taken} were handed out"
    after = (list(manager.pool.free_queue), dict(manager.pool.block_hashes), list(manager.pool.ref_counts))
    assert after == before, f"nothing was handed out, and the pool changed: {before} became {after}"
    assert manager.block_tables == {}, f"nothing was handed out, and there is a table: {manager.block_tables}"


def test_t08_a_hit_is_verified_even_if_digests_collide(monkeypatch):
    """With a digest that is the same for everything, different blocks are still different."""
    class Weak:
        def __init__(self, content):
            pass

        def digest(self):
            return b"always the same"

    monkeypatch.setattr(kv_cache.hashlib, "sha256", Weak)
    manager = KVCacheManager(6, 2, True, 16)
    admit(manager, make_request("A", [1, 1, 9]))
    assert manager.get_computed_blocks(make_request("B", [2, 2, 9])) == ([], 0), "A's block holds other tokens"
    assert manager.get_computed_blocks(make_request("C", [1, 1, 9]))[1] == 2


def test_t08_a_salt_in_the_first_block_separates_whole_sequences():
    """Of one prompt two tenants with salts of their own share nothing, and the same tenant shares all."""
    manager = KVCacheManager(12, 2, True, 16)
    admit(manager, make_request("A", [1] * 5, cache_salt="one"))
    for salt, expected in (("two", 0), (None, 0), ("one", 4)):
        found = manager.get_computed_blocks(make_request("B", [1] * 5, cache_salt=salt))[1]
        assert found == expected, f"with salt {salt!r} {found} tokens of a sequence with salt 'one' are hit, not {expected}"


def test_t09_a_table_is_handed_out_as_a_copy():
    """What a step was given does not grow behind its back."""
    manager = KVCacheManager(6, 2, True, 16)
    request = make_request("A", [1] * 3)
    admit(manager, request)
    given_out = manager.get_block_ids("A")
    manager.allocate_slots(request, 2)
    assert given_out == [1, 2], "the copy is as it was"
    assert manager.get_block_ids("A") == [1, 2, 3]


def test_t10_counts_equal_the_tables_that_hold_a_block():
    """A block's references are the tables that hold it, and the check of the invariants sees when the two disagree."""
    manager = KVCacheManager(6, 2, True, 16)
    admit(manager, make_request("A", [1] * 5))
    hits = admit(manager, make_request("B", [1] * 5))
    assert len(hits) == 2, f"of A's 3 blocks B hits {hits}, not the two full ones"
    assert manager.pool.ref_counts[1] == 2, f"A and B hold block 1, which counts {manager.pool.ref_counts[1]} references"
    manager.block_tables["B"].pop()
    with refused("check(), after B's table has lost a block,", "references and is in"):
        manager.check()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_t18_a_block_is_taken_when_its_first_slot_is_needed(size):
    """A request has ceil(tokens / B) blocks: with prompts of B-1, B, B+1 and 2B tokens, and then at each token more."""
    for num_prompt in (max(1, size - 1), size, size + 1, 2 * size):
        manager = KVCacheManager(20, size, True, 64)
        request = make_request("A", list(range(num_prompt)))
        admit(manager, request)
        for _ in range(2 * size + 1):
            num_blocks = len(manager.get_block_ids("A"))
            need = -(-request.num_tokens // size)
            assert num_blocks == need, f"{request.num_tokens} tokens in {num_blocks} blocks of {size} instead of {need}"
            request.all_token_ids.append(5)
            manager.allocate_slots(request, 1)
            request.num_computed_tokens += 1


def test_t18_growth_without_a_free_block_is_refused_only_at_the_edge():
    """With no block free a sequence still fills the one it has."""
    manager = KVCacheManager(2, 4, True, 64)
    request = make_request("A", [1, 2, 3])
    admit(manager, request)
    taken = manager.allocate_slots(request, 1)
    assert taken == [], f"position 3 is in the block that the request owns, and allocate_slots gives {taken} instead of []"
    request.num_computed_tokens = 4
    taken = manager.allocate_slots(request, 1)
    assert taken is None, f"position 4 needs a second block, none is free, and allocate_slots gives {taken} instead of None"
    manager.check()


def test_lookahead_slots_end_at_the_longest_sequence():
    """Room for drafts is taken together with that for the step's tokens, and none beyond max_model_len."""
    manager = KVCacheManager(9, 2, True, 6)
    request = make_request("A", [1, 2, 3])
    first, second = (manager.allocate_slots(request, 3, num_lookahead_tokens=count) for count in (1, 9))
    assert len(first) == 2, f"3 tokens and 1 more in blocks of 2 take {first}, not two blocks"
    assert len(second) == 1, f"6 positions at most are 3 blocks of 2; to the first two come {second}"


def test_truncate_gives_back_whole_blocks_beyond_the_cut():
    """Rejected drafts cost no memory: the block that is still needed stays, those behind it go, last first."""
    manager = KVCacheManager(9, 2, True, 16)
    request = make_request("A", [1, 2, 3])
    manager.allocate_slots(request, 3, num_lookahead_tokens=5)
    manager.truncate(request, 3)
    assert manager.get_block_ids("A") == [1, 2]
    assert list(manager.pool.free_queue)[:2] == [3, 4], "block 4 was freed first, so 3 lies before it"
    manager.cache_blocks(request, 3)
    with pytest.raises(AssertionError, match="published"):
        manager.truncate(request, 1)
    manager.check()


def test_full_sequence_must_fit_is_a_question_and_not_a_reservation():
    """With full_sequence_must_fit all known tokens must have room, and only the tokens of this step are given it."""
    manager = KVCacheManager(4, 2, True, 16)
    taken = manager.allocate_slots(make_request("A", [1] * 7), 2, full_sequence_must_fit=True)
    assert taken is None, f"7 known tokens need 4 blocks of 2 and there are 3, and yet {taken} were handed out"
    taken = manager.allocate_slots(make_request("B", [1] * 6), 2, full_sequence_must_fit=True)
    assert taken == [1], f"6 known tokens fit, and the step's 2 tokens take block 1: {taken} were handed out"
    assert manager.num_free_blocks == 2, f"one of 3 blocks is taken, and {manager.num_free_blocks} are free"


def test_only_full_blocks_are_published_and_each_once():
    """Three tokens in blocks of two name one block; the fourth names the second, and nothing is named again."""
    manager = KVCacheManager(6, 2, True, 16)
    request = make_request("A", [1, 2, 3, 4])
    manager.allocate_slots(request, 4)
    assert [manager.cache_blocks(request, count) for count in (1, 2, 3, 3, 4, 4)] == [[], [1], [], [], [2], []]


def test_every_block_is_hashed_once_in_a_requests_life(monkeypatch):
    """Waiting, running, preempted and back: the cost of naming is one hash for each full block."""
    calls = []

    def count(parent, token_ids, extra_keys):
        calls.append(token_ids)
        return hash_block_tokens(parent, token_ids, extra_keys)

    monkeypatch.setattr(kv_cache, "hash_block_tokens", count)
    manager = KVCacheManager(9, 2, True, 32)
    request = make_request("A", list(range(5)))
    for _ in range(3):
        manager.get_computed_blocks(request)
        admit(manager, request)
        leave(manager, request)
    assert [list(one) for one in calls] == [[0, 1], [2, 3]], f"two full blocks were hashed {len(calls)} times"


def test_a_request_for_prompt_logprobs_publishes_and_does_not_read():
    """Its prompt's logits are wanted, so all of it is computed; others may use what it computed."""
    manager = KVCacheManager(9, 2, True, 16)
    admit(manager, make_request("A", [1] * 5))
    asks = make_request("B", [1] * 5, prompt_logprobs=1)
    assert manager.get_computed_blocks(asks) == ([], 0)
    other = make_request("C", [2] * 5, prompt_logprobs=1)
    admit(manager, other)
    assert manager.get_computed_blocks(make_request("D", [2] * 5))[1] == 4


def test_caching_off_means_no_hits_and_no_hashing():
    """Without the prefix cache a manager is only tables."""
    manager = KVCacheManager(9, 2, False, 16)
    first = make_request("A", [1] * 5)
    admit(manager, first)
    assert manager.get_computed_blocks(make_request("B", [1] * 5)) == ([], 0)
    manager.name_full_blocks(first, 4)
    assert first.block_hashes == []


def test_uncache_takes_names_back_and_nothing_else():
    """After a failed step nobody finds its blocks, and their owners still own them."""
    manager = KVCacheManager(9, 2, True, 16)
    request = make_request("A", [1] * 5)
    manager.allocate_slots(request, 5)
    manager.uncache(manager.cache_blocks(request, 5))
    assert manager.get_computed_blocks(make_request("B", [1] * 5)) == ([], 0)
    manager.check()
    leave(manager, request)
    assert list(manager.pool.free_queue)[:3] == [1, 2, 3], "without names all three are reused first"


def test_freeing_a_request_that_owns_nothing_is_harmless():
    """Free on preemption, free again on abort: the second one has nothing to do."""
    manager = KVCacheManager(4, 2, True, 16)
    request = make_request("A", [1] * 3)
    manager.free(request)
    admit(manager, request)
    leave(manager, request)
    leave(manager, request)
    assert manager.num_free_blocks == 3


def test_usage_is_the_share_that_requests_hold():
    """Half of the pool held is 0.5, and a cached block that nobody holds is free."""
    manager = KVCacheManager(5, 2, True, 16)
    assert manager.usage == 0
    request = make_request("A", [1] * 4)
    admit(manager, request)
    assert manager.usage == 0.5
    leave(manager, request)
    assert manager.usage == 0
    assert manager.reset_prefix_cache()
    assert manager.get_computed_blocks(make_request("B", [1] * 4)) == ([], 0)
