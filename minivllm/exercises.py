"""The exercises: which functions become blanks, which tests say that they are filled in, and what may be said as a hint.

Owns names and sentences. A new exercise is one entry here, and its wrong answers in tests/wrong_answers.py: they show the
reference's lines, so they do not stand where somebody who is stuck will look. tests/test_exercises.py proves every entry.

    07-block-pool     lesson 7 has one exercise: `start 7`
    01b-attention     lesson 1 has several:      `start 1b`
"""

from __future__ import annotations

from dataclasses import dataclass

NO_MODEL = ("block_pool", "kv_cache", "scheduler")  # modules whose tests run none: they take a second or two

LESSONS = {
    0: "One token at a time", 1: "The model in one sitting", 2: "Remember keys and values", 3: "Two machines in one",
    4: "Choosing a token", 5: "Batching, the obvious way", 6: "Continuous batching", 7: "The block pool",
    8: "Attention through a table", 9: "One scheduler", 10: "Chunked prefill", 11: "Prefix caching", 12: "Guess ahead",
    13: "Serve it", 14: "On a GPU",
}


@dataclass(frozen=True)
class Exercise:
    """`blanks` are functions of minivllm/`module`.py, methods as Class.method; `tests` are pytest ids; each hint says more."""

    name: str
    module: str
    blanks: tuple[str, ...]
    tests: tuple[str, ...]
    hints: tuple[str, ...]

    @property
    def number(self) -> str:
        """As it is typed: "7", or "1b"."""
        label = self.name.split("-")[0]
        return label[1:] if label.startswith("0") else label

    @property
    def lesson(self) -> int:
        return int(self.name[:2])

    @property
    def seconds(self) -> int:
        """How long its tests may take: ten times what they need and more, so that only a loop without end is ended."""
        return 15 if self.module in NO_MODEL else 60


def of(file: str, *tests: str) -> tuple[str, ...]:
    """The ids of tests of one file."""
    return tuple(f"tests/{file}.py::test_{test}" for test in tests)


EXERCISES = (
    Exercise(
        "00-greedy", "generate", ("greedy",),
        of("test_generate", "recomputing_says_what_hugging_face_says[float64]", "64_tokens_after_64_cost_6112_positions_or_127"),
        ("Each pass takes every token so far, at positions 0, 1, 2, ...: which row of the result has seen all of them?",
         "`next_token_ids` turns a hidden state into a token. Append it, then ask whether it ends the output: it belongs to it.",
         "For the counters remember how many tokens the last pass had: so many are recomputed now, and the others are useful.")),
    Exercise(
        "01a-rope", "model", ("rotate_half", "rope"),
        of("test_model", "rotate_half_is_a_quarter_turn", "rope_turns_each_pair_as_one_complex_number",
           "rope_sees_only_the_distance"),
        ("The partner of number i is number i + D/2, not number i + 1: the two halves of a head, not neighbors.",
         "cos and sin have no axis for heads. Where does x have it, and how does a tensor get an axis of length 1 there?")),
    Exercise(
        "01b-attention", "model", ("attention",),
        of("test_model", "t30_attention_equals_the_plain_sum", "attention_of_a_batch_is_that_of_its_rows",
           "a_query_that_may_look_at_nothing_is_finite", "t24_slots_that_nobody_may_read_leave_no_trace",
           "grouped_queries_copy_no_keys"),
        ("With q as (..., K, H/K * Tq, D) one product with k gives all scores. Which `unflatten` and `flatten` bring it there?",
         "A row of -inf has no softmax. A number that is only very low leaves no weight either, and does not become NaN.",
         "A weight of 0 times NaN is NaN, so the values that no query may look at have to go as well, before they are summed.")),
    Exercise(
        "01c-decoder-layer", "model", ("RMSNorm.forward", "MLP.forward", "DecoderLayer.after_attention"),
        of("test_model", "t30_a_head_size_of_its_own_equals_hugging_face", "the_past_does_not_change"),
        ("The norm takes no mean away: x over the root of its mean square, which Hugging Face computes in float32 in any case.",
         "`gate_up_proj` gives both halves of one matrix product, gate first. Only the gate goes through silu.",
         "Two sums: x and the projection of what was seen; then that and what the MLP makes of *its* norm.")),
    Exercise(
        "02a-dense-cache", "dense_cache", ("DenseCache.append",),
        of("test_dense_cache", "t29_appending_changes_the_cache_itself", "appended_tokens_lie_in_their_row_and_column"),
        ("Two index tensors (T,), one for rows and one for columns, name T places. Which division gives which?",
         "`x[rows][:, :, columns] = k` writes into a copy. One pair of brackets on the left of the `=` writes into x.",
         "With a slice between two index tensors, `x[rows, :, columns]`, the indexed axis comes first: (T, K, D), as k has it.")),
    Exercise(
        "02b-causal-mask", "dense_cache", ("causal_mask",),
        of("test_dense_cache", "a_query_sees_its_row_from_the_first_token_to_itself", "attending_equals_each_row_alone"),
        ("Compare the numbers of all columns, (S,), with the column of each query, (B, Tq): an axis of length 1 makes them meet.",
         "A second step's query stands behind everything that is kept: its own column counts, not its place in this step.",
         "Two comparisons joined by &: not behind the query, and not before `first` of its row.")),
    Exercise(
        "02c-greedy-cached", "generate", ("greedy_cached",),
        of("test_generate", "caching_changes_no_token[float64]", "64_tokens_after_64_cost_6112_positions_or_127"),
        ("It is the loop of `greedy`, but a pass computes only the tokens that the cache lacks: first the whole prompt, then one.",
         "A token's position is its place in the whole sequence. The second pass does not begin at 0.",
         "`dense_step(model, caches, ids, positions, first, stats, num_useful=...)` wants ids and positions as (1, Tq).")),
    Exercise(
        "03a-flops", "cost", ("flops",),
        of("test_cost", "flops_of_a_prompt_are_what_pytorch_counts", "flops_of_a_decode_batch_are_what_pytorch_counts",
           "a_batch_reads_the_weights_once"),
        ("`layer_matrix_numbers` counts the numbers of a layer's matrices; each of them is multiplied and added once a token.",
         "A query and a key of D numbers meet with D multiplications, and the value behind the key takes as many again.",
         "Keys are shared between heads, work is not: every query head meets every key.")),
    Exercise(
        "03b-bytes-moved", "cost", ("bytes_moved",),
        of("test_cost", "bytes_moved_are_weights_and_context", "a_batch_reads_the_weights_once"),
        ("Three sums: weights, read once however many requests there are; rows of the embedding; keys and values.",
         "`num_parameters` counts an untied embedding as two matrices. Of the first, only rows are read.",
         "Keys and values: the step's own tokens are written, and every context is read, those tokens included.")),
    Exercise(
        "04a-top-k", "sampler", ("top_k",),
        of("test_sampler", "t39_top_k_keeps_k_tokens_and_what_ties_with_the_last", "t39_top_k_off_changes_nothing"),
        ("Find the k-th largest logit of each row: what is below it goes, what equals it stays.",
         "`largest` orders only `width` logits. The k-th of a row with k = V is not among them: which bound keeps all?",
         "`gather` with k - 1 takes each row's own k-th; `clamp` first keeps the index inside of what was ordered.")),
    Exercise(
        "04b-top-p", "sampler", ("top_p",),
        of("test_sampler", "t38_top_p_keeps_the_token_that_crosses_p", "t39_top_p_keeps_equal_tokens_together",
           "t38_the_smallest_top_p_keeps_the_likeliest", "t39_tokens_at_minus_infinity_stay_there"),
        ("A token stays if the tokens that are likelier than it sum to less than p: the one that crosses p does.",
         "`cumsum` of ordered probabilities, less the token's own, is what the likelier ones sum to.",
         "Turn the answer back into one bound a row, the smallest logit that stays, and compare all logits with it: ties stay.")),
    Exercise(
        "04c-penalties", "sampler", ("repetition_penalty", "output_penalties"),
        of("test_sampler", "t39_masks_bias_and_penalties_are_hugging_faces"),
        ("A penalty above 1 must make a token less likely, whatever the sign of its logit: what does a division do to -2?",
         "The penalties are (R,) and the logits (R, V): give them an axis.",
         "Presence counts once, however often the token came; frequency counts every time.")),
    Exercise(
        "05-left-pad", "generate", ("left_pad",),
        of("test_generate", "left_padding_is_exact", "padding_changes_no_token[float64]"),
        ("How many columns of padding has each row? Everything else follows from these numbers.",
         "Column numbers less the row's padding are its positions, negative over the padding.",
         "The mask needs no loop: a position tells whether it is padding.")),
    Exercise(
        "06-slots", "slot_batching", ("SlotScheduler.schedule",),
        of("test_generate", "rows_are_given_in_order_and_never_idle", "joining_at_once_takes_fewer_steps"),
        ("Go over the rows once, from the lowest. Two questions at each: is its request finished, and is the row free now?",
         "A row that was emptied in this call can be given away in this call: the second question comes after the first.",
         "`waiting` is a deque: who came first leaves on the left.")),
    Exercise(
        "07-block-pool", "block_pool", ("BlockPool.get_new_blocks", "BlockPool.free_blocks"),
        of("test_block_pool", "every_block_is_free_or_owned", "blocks_are_taken_from_the_left",
           "a_block_without_a_name_is_reused_first", "a_block_with_a_name_is_kept_longest",
           "a_hash_is_lost_only_when_the_block_is_taken", "t05_a_shared_block_is_free_when_its_last_owner_leaves",
           "t05_a_double_free_is_our_mistake_and_says_so", "asking_for_more_than_is_free_is_our_mistake_and_says_so"),
        ("`free_queue` is an OrderedDict of block ids: `popitem(last=False)` takes from the left, a new key goes to the right.",
         "A shared block has two owners. Which `free_blocks` makes it free? `ref_counts` knows.",
         "`move_to_end(block_id, last=False)` puts a block to the front. `block_hashes` knows which block has a hash.",
         "A block that is handed out will soon hold something else: `evict(block_id)` makes sure that no hit finds it any more.",
         "Both need an assert with a sentence: it names how many blocks are wanted and free, or which block is freed twice.")),
    Exercise(
        "08a-slot-mapping", "attention", ("slot_mapping",),
        of("test_attention", "a_token_lies_where_its_table_says", "t23_a_padded_token_goes_to_the_null_block",
           "t30_slots_of_a_large_pool_do_not_overflow"),
        ("A position is a block of the table and an offset in that block: one division gives both.",
         "The table is int32, and an id times the block size may be too large for that. When do you widen it?",
         "-1 // 4 is -1, and -1 % 4 is 3: padding would land in the last block of the table. `torch.where` ends that.")),
    Exercise(
        "08b-gather", "attention", ("context_slots", "gather_kv"),
        of("test_attention", "a_context_is_read_in_logical_order", "t30_a_context_in_a_large_pool_does_not_overflow",
           "t28_a_context_may_end_anywhere_in_a_block", "t24_what_nobody_wrote_may_be_nan", "decodes_share_one_gather"),
        ("Positions 0, 1, 2, ... for every request, but never more than its last one: `minimum` with an axis for requests.",
         "`slot_mapping` takes rows and positions of any shape, as long as they broadcast: (B, 1) and (B, S).",
         "`index_select` wants one flat list of slots and copies them along axis 1. Then give the copy its axes back.")),
    Exercise(
        "09a-admission", "scheduler", ("Scheduler._schedule_waiting",),
        of("test_scheduler", "a_step_is_tokens_for_requests_under_one_budget", "t15_seats_are_for_resident_requests",
           "t21_first_tokens_come_in_order_of_arrival"),
        ("Look at the first waiting request only: if it cannot come in, nobody behind it may.",
         "`_admit(request, budget)` takes the request out of the queue and says how many tokens it got; 0: it still waits.",
         "A seat is a place in `running`; there are `max_num_running`. `_decide` only notes reasons: you may leave it out.")),
    Exercise(
        "09b-preemption", "scheduler", ("Scheduler._allocate_or_preempt", "Scheduler._preempt"),
        of("test_scheduler", "the_newest_running_request_gives_way", "t05_preempted_then_aborted_frees_once",
           "t16_a_resumed_request_neither_repeats_nor_skips_a_token", "t12_a_preempted_request_longer_than_the_budget_comes_back"),
        ("`allocate_slots` returns None when the pool has too few. Ask again after each request that gave way.",
         "`running` is in order of admission, so the newest is the last. What if the newest is the request that needs the blocks?",
         "A preempted request starts over: no blocks, nothing computed or on the way, and the first place in the queue.",
         "Three things count it: `request.num_preemptions`, `stats.num_preemptions` and `next_output.preempted_request_ids`.",
         "`why` is for whoever reads the decisions (lesson 9 does): `_preempt` hands it to `_decide`, and any text will do.")),
    Exercise(
        "10-chunks", "scheduler", ("Scheduler._split",),
        of("test_scheduler", "the_threshold_caps_a_long_prompt_only_in_company", "a_step_is_tokens_for_requests_under_one_budget",
           "without_chunked_prefill_a_prompt_runs_whole_or_waits"),
        ("The smallest of up to three numbers: what is missing, what the budget has left, and perhaps the threshold.",
         "Chunked prefill off: all of it or 0, and the threshold has no say. `len(self.requests)` tells who else is there.")),
    Exercise(
        "11a-block-hash", "kv_cache", ("hash_block_tokens",),
        of("test_kv_cache", "a_name_covers_everything_from_the_first_token", "tokens_are_not_run_together_in_a_name",
           "extra_keys_keep_equal_tokens_apart", "t08_a_salt_in_the_first_block_separates_whole_sequences"),
        ("Three things go into the digest, one after the other, as bytes: the parent's digest, the token ids, the extra keys.",
         "`array(\"q\", token_ids).tobytes()` gives each id 8 bytes, so [1, 23] and [12, 3] differ.",
         "`hashlib.sha256(data).digest()` is the digest; `BlockHash` keeps what went into it beside it.")),
    Exercise(
        "11b-longest-hit", "kv_cache", ("find_longest_cache_hit",),
        of("test_kv_cache", "the_hit_is_the_longest_common_beginning_in_whole_blocks", "a_gap_ends_the_prefix",
           "t03_a_known_prompt_computes_its_last_token"),
        ("`pool.get_cached_block(name)` gives an id or None. What does the first None mean for the blocks behind it?",
         "One token is always computed. How many whole blocks fit into the others?")),
    Exercise(
        "11c-shared-blocks", "block_pool", ("BlockPool.touch", "BlockPool.evict"),
        of("test_block_pool", "every_block_is_free_or_owned", "a_hit_takes_a_free_block_out_of_the_middle_of_the_queue",
           "t05_a_shared_block_is_free_when_its_last_owner_leaves", "t04_two_blocks_with_one_content_live_side_by_side"),
        ("A block that somebody holds is not in `free_queue`. Which count tells whether this one is?",
         "`cached_blocks[hash]` may list two blocks with the same content. Only one of them is evicted.",
         "A block may have no hash: then there is nothing to forget. And a hash without any block left must not stay in the map.")),
    Exercise(
        "11d-allocate-slots", "kv_cache", ("KVCacheManager.num_blocks_to_take", "KVCacheManager.allocate_slots"),
        of("test_kv_cache", "t18_a_block_is_taken_when_its_first_slot_is_needed",
           "t18_growth_without_a_free_block_is_refused_only_at_the_edge", "t07_a_hit_in_the_free_queue_takes_room",
           "t06_a_hit_is_not_evicted_to_make_room_for_its_own_request", "t10_counts_equal_the_tables_that_hold_a_block",
           "lookahead_slots_end_at_the_longest_sequence", "full_sequence_must_fit_is_a_question_and_not_a_reservation"),
        ("Blocks for n tokens: -(-n // block_size), which rounds up. What the request owns, hits too, is not missing.",
         "A hit whose reference count is 0 lies in the free queue: taking it leaves one block less for the others.",
         "First decide, then change: None means that nothing has happened. Then touch the hits, before new blocks are taken.",
         "A new request gets a table (`block_tables`), headed by its hits, and `num_cached_blocks`: its hits have names already.")),
    Exercise(
        "12a-accepted-run", "speculative", ("accepted_run",),
        of("test_speculative", "a_run_is_the_longest_matching_prefix_and_one_more", "one_row_too_few_is_our_mistake_and_says_so"),
        ("There is one sample more than there are drafts: the last one stands behind a run that is right to its end.",
         "Sample i counts if drafts 0 .. i-1 were right. So the first sample that differs from its draft counts too.",
         "Find how many drafts are right from the left on; that many samples and one more are the run.",
         "An assert comes first: a sentence for whoever brings another number of samples than drafts and one.")),
    Exercise(
        "12b-prompt-lookup", "speculative", ("look_up",),
        of("test_speculative", "look_up_finds_the_first_place_of_the_longest_end", "a_draft_is_what_followed_the_last_time"),
        ("Longest end first. An end has at most len - 1 tokens, or nothing could stand before it.",
         "`array(\"q\", token_ids).tobytes()` has 8 bytes a token, and `find` searches bytes: a match may begin within a token.",
         "The end of the text always finds itself. What tells that place from one that something follows?")),
    Exercise(
        "12c-rejection-sampling", "rejection_sampling", ("rejection_sample",),
        of("test_speculative", "rejection_sampling_gives_the_targets_distribution_at_every_position",
           "a_draft_of_the_target_itself_is_always_kept", "a_token_that_the_target_never_says_is_never_kept"),
        ("Keep x with the probability min(1, p[x] / q[x]): a number u in 0 .. 1 is compared, and without a division.",
         "A refused token is replaced by a draw from (p - q), where that is positive; `draw_from` takes weights of any sum.",
         "The last row of `target_probs` has no draft. It is drawn from only if nobody was refused.")),
    Exercise(
        "13a-stop-strings", "detokenizer", ("find_stop", "num_held_back"),
        of("test_detokenizer", "of_two_that_end_together_the_longest_counts", "only_what_can_become_a_stop_string_is_held_back",
           "t43_stop_strings_end_the_text_like_the_slow_spec", "t43_a_stop_string_over_several_tokens_cuts_before_itself"),
        ("A stop string of 7 characters that ends in the newest one begins 6 before it: where must the search begin?",
         "Tuples (end, start, stop) compare in this order, so `min` finds the earliest end, and of these the earliest start.",
         "Held back: for each stop string the longest beginning of it, but not all of it, with which the text ends.")),
    Exercise(
        "13b-streaming", "detokenizer", ("TextStream.push", "TextStream.flush"),
        of("test_detokenizer", "t43_streamed_text_joins_to_the_whole_text_in_every_language",
           "t43_half_a_character_at_the_end_comes_with_the_end", "t43_random_tokens_stream_like_they_decode",
           "no_run_of_tokens_makes_the_stream_wait_longer_and_longer"),
        ("`self.stream.step(self.tokenizer, token_id)` returns text, or None while a character is incomplete.",
         "`waiting` holds the ids since the last text. Text has come: nothing waits any more. None: this id waits too.",
         "At the end, what waits is decoded as it is, half characters and all; `_restart([])` empties the stream.")),
    Exercise(
        "13c-abort", "scheduler", ("Scheduler.finish_requests",),
        of("test_scheduler", "t20_abort_frees_everything_in_any_state", "t20_abort_in_the_middle_of_a_prompt",
           "t20_abort_of_the_finished_or_unknown_does_nothing", "t05_preempted_then_aborted_frees_once"),
        ("One id or several; known or not; twice in one call. `requests` knows who is in the engine, and `pop` asks only once.",
         "A request that is not RUNNING stands in `waiting`, also one that was preempted, and must leave it.",
         "`_release` gives the blocks back and clears `running`, by the status that the requests have by then.")),
    Exercise(
        "14-buckets", "cuda_graphs", ("bucket_sizes", "bucket_of"),
        of("test_cuda_graphs", "t32_every_batch_size_has_a_bucket_and_no_bucket_is_too_large",
           "a_batch_goes_into_the_smallest_bucket_that_holds_it", "padding_stays_small"),
        ("The last bucket is max_num_seqs itself, whatever it is: a larger one would have rows that nobody has.",
         "Four ranges, all cut off below max_num_seqs: 1, 4, 8, 16; 32, 64, 96; 128, 144, ... below 256; 256, 320, ...",
         "For a batch: the first bucket that is not smaller than it.")),
)
