"""Plausible wrong answers to the exercises, each an edit of the reference: (lines that stand in it once, what they become).

Most of them are real defects of public projects (T numbers: the list of traps). test_exercises.py shows that each is rejected.
"""

WRONG: dict[str, tuple[tuple[str, str], ...]] = {
    "00-greedy": (
        ("tokens.append(int(next_token_ids(model, hidden[-1])))", "tokens.append(int(next_token_ids(model, hidden[0])))"),
        ("        ids = torch.tensor(tokens, device", "        ids = torch.tensor(tokens[num_computed:], device"),  # no cache has the rest
        ("        stats.recomputed_positions += num_computed\n", ""),
        ("    return tokens[len(prompt_token_ids) :]\n\n\ndef dense_caches", "    return tokens\n\n\ndef dense_caches"),
    ),
    "01a-rope": (
        ("    return torch.cat((-second, first), dim=-1)", "    return torch.cat((second, -first), dim=-1)"),
        ("    first, second = x.chunk(2, dim=-1)  # views (..., D/2)\n    return torch.cat((-second, first), dim=-1)",
         "    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)"),  # neighbors as pairs, as GPT-J has them
        ("cos.unsqueeze(-2), sin.unsqueeze(-2)", "cos.unsqueeze(0), sin.unsqueeze(0)"),
    ),
    "01b-attention": (
        ("q.unflatten(-3, (num_kv_heads, group)).flatten", "q.unflatten(-3, (group, num_kv_heads)).transpose(-4, -3).flatten"),  # T30
        ("(q * q.shape[-1] ** -0.5)", "q"),
        ("torch.finfo(scores.dtype).min", "float('-inf')"),
        ("    v = v.masked_fill(~mask.any(-2)[..., None, :, None], 0)\n", ""),  # T24
        ("    scores = scores.masked_fill(~mask[..., None, None, :, :], torch.finfo(scores.dtype).min)\n", ""),
    ),
    "01c-decoder-layer": (
        ("self.down_proj(F.silu(gate) * up)", "self.down_proj(gate * F.silu(up))"),
        ("x = x + self.self_attn.o_proj(seen.flatten(1))", "x = self.self_attn.o_proj(seen.flatten(1))"),
        ("return x + self.mlp(self.post_attention_layernorm(x))", "return x + self.mlp(x)"),
        ("wide = x.float()", "wide = x.float() - x.float().mean(-1, keepdim=True)"),
    ),
    "02a-dense-cache": (
        ("self.keys[rows, :, columns] = k", "self.keys[rows][:, :, columns] = k"),  # T29: into a copy
        ("self.values[rows, :, columns] = v", "self.values[rows, :, columns] = k"),
        ("rows, columns = slot_mapping // self.max_len, slot_mapping % self.max_len",
         "columns, rows = slot_mapping // self.max_len, slot_mapping % self.max_len"),
    ),
    "02b-causal-mask": (
        ("keys <= columns[:, :, None]", "keys <= torch.arange(columns.shape[1])[:, None]"),  # the offset is lost
        ("keys <= columns[:, :, None]", "keys < columns[:, :, None]"),
        ("    return is_past & (keys >= first[:, None, None])", "    return is_past"),  # padding is seen
    ),
    "02c-greedy-cached": (
        ("torch.arange(num_computed, len(tokens), device=first.device)", "torch.arange(len(tokens) - num_computed)"),
        ("        num_computed = len(tokens)\n        tokens.append(int(dense_step", "        tokens.append(int(dense_step"),  # unused
        ("torch.tensor([tokens[num_computed:]]", "torch.tensor([tokens[-1:]]"),
    ),
    "03a-flops": (
        ("    scores_and_values = 2 * 2 * pairs", "    scores_and_values = 2 * pairs"),
        ("pairs * config.num_attention_heads", "pairs * config.num_key_value_heads"),
        ("    logits = 2 * len(query_lens)", "    logits = 2 * num_tokens"),
        ("    matrices = 2 * num_tokens", "    matrices = num_tokens"),
    ),
    "03b-bytes-moved": (
        ("    matrices = num_parameters(config) - (0 if config.tie_word_embeddings else embedding)",
         "    matrices = num_parameters(config)"),
        ("    kv_tokens = num_tokens + sum(context_lens)", "    kv_tokens = sum(context_lens)"),
        ("    return (matrices + looked_up) * dtype_bytes", "    return len(query_lens) * (matrices + looked_up) * dtype_bytes"),
    ),
    "04a-top-k": (
        ("logits.masked_fill(logits < kth.masked_fill((k >= vocab_size)[:, None], NEVER), NEVER)",
         "logits.masked_fill(logits <= kth, NEVER)"),
        ("k.clamp(max=ordered.shape[-1])[:, None] - 1", "k.clamp(max=ordered.shape[-1] - 1)[:, None]"),
        ("    return logits.masked_fill(logits < kth.masked_fill", "    return logits.masked_fill(logits.amax() < kth.masked_fill"),
    ),
    "04b-top-p": (
        ("    before = weights.cumsum(dim=-1) - weights", "    before = weights.cumsum(dim=-1)"),  # T38: the one that crosses is lost
        ("    is_kept[:, 0] = True", "    is_kept[:, 0] &= True"),
        ("logits.masked_fill(logits < smallest.masked_fill((p >= 1)", "logits.masked_fill(logits <= smallest.masked_fill((p >= 1)"),
    ),
    "04c-penalties": (
        ("torch.where(logits < 0, logits * penalty, logits / penalty)", "logits / penalty"),
        ("presence[:, None] * (counts > 0)", "presence[:, None] * counts"),
        ("logits - frequency[:, None] * counts", "logits - frequency[:, None] * (counts - 1)"),
    ),
    "05-left-pad": (
        ("    positions = torch.arange(longest, device=device) - padding[:, None]",
         "    positions = torch.arange(longest, device=device).expand(len(prompts), -1)"),
        ("[0] * (longest - len(prompt)) + list(prompt) for prompt", "list(prompt) + [0] * (longest - len(prompt)) for prompt"),
        ("    return ids, positions, positions >= 0", "    return ids, positions, ids != 0 "),
        ("    return ids, positions, positions >= 0", "    return ids, positions, positions > 0"),
    ),
    "06-slots": (
        ("self.waiting.popleft()", "self.waiting.pop()"),
        ("            if self.rows[row] is None and self.waiting:", "            elif self.rows[row] is None and self.waiting:"),
        ("        for row, request in enumerate(self.rows):\n            if request is not None and request.is_finished:",
         "        if not all(request is None or request.is_finished for request in self.rows):\n            return []\n"
         "        for row, request in enumerate(self.rows):\n            if request is not None and request.is_finished:"),
    ),
    "07-block-pool": (
        ("            if self.ref_counts[block_id] == 0:\n                self.free_queue[block_id] = None\n                if block_id not",
         "            if True:\n                self.free_queue[block_id] = None\n                if block_id not"),  # T5
        ("            self.evict(block_id)\n", ""),  # T1: a stale hash
        ("                if block_id not in self.block_hashes:\n                    self.free_queue.move_to_end(block_id, last=False)\n", ""),
        ("            self.ref_counts[block_id] = 1\n", ""),
        ("self.free_queue.popitem(last=False)", "self.free_queue.popitem()"),
        ('            assert self.ref_counts[block_id] > 0, f"block {block_id} is freed, and no table holds it"\n', ""),
        ("                if block_id not in self.block_hashes:\n                    self.free", "                if block_id not in self.cached_blocks:\n                    self.free"),
        ("            block_ids.append(block_id)\n        return block_ids", "            block_ids.append(block_id)"),
        ('f"{num_blocks} blocks wanted, {len(self.free_queue)} free"', '"too many"'),
    ),
    "08a-slot-mapping": (
        ("positions // block_size].long()", "positions // block_size]"),  # T30: overflows
        ("    return torch.where(positions < 0, NULL_BLOCK * block_size, slots)", "    return slots"),
        ("    return torch.where(positions < 0, NULL_BLOCK * block_size, slots)", "    return torch.where(positions < 0, -1, slots)"),
        ("slots = block_ids * block_size + positions % block_size", "slots = block_ids * block_size + (positions - 1) % block_size"),
    ),
    "08b-gather": (
        ("    return slot_mapping(block_table, rows, positions, block_size)",
         "    return block_table.gather(1, positions // block_size) * block_size + positions % block_size"),  # T30: overflows
        (".minimum(last)", " + 0 * last"),  # T24: reads what nobody wrote
        (".minimum(last)", ".minimum(last + 1)"),
        ("    return flat.view(cache.shape[0], *slots.shape, cache.shape[2])",
         "    return flat.view(*slots.shape, cache.shape[0], cache.shape[2]).movedim(-2, 0)"),
    ),
    "09a-admission": (
        ("            budget -= num_new_tokens\n        if self.waiting:", "        if self.waiting:"),
        ("            if len(self.running) >= self.max_num_running:", "            if False:"),  # T15
        ("            if num_new_tokens == 0:\n                return\n            budget -=",
         "            if num_new_tokens == 0 and len(self.waiting) > 1:\n                request = list(self.waiting)[1]\n"
         "                num_new_tokens = self._admit(request, budget)\n"
         "            if num_new_tokens == 0:\n                return\n            budget -="),  # overtakes
    ),
    "09b-preemption": (
        ("victim = self.running.pop()", "victim = self.running.pop(0)"),
        ("self.waiting.appendleft(request)", "self.waiting.append(request)"),
        ("        request.num_computed_tokens = request.num_output_placeholders = 0  # it", "        request.num_output_placeholders = 0  # it"),
        ("        self.kv_cache_manager.free(request)\n        request.status = RequestStatus.PREEMPTED\n",
         "        request.status = RequestStatus.PREEMPTED\n"),
    ),
    "10-chunks": (
        ("return min(num_missing_tokens, budget)", "return num_missing_tokens"),
        ("if self.config.long_prefill_token_threshold and len(self.requests) > 1:", "if self.config.long_prefill_token_threshold:"),
        ("return num_missing_tokens if num_missing_tokens <= budget else 0", "return min(num_missing_tokens, budget)"),
    ),
    "11a-block-hash": (
        ("hashlib.sha256(parent_digest + content", "hashlib.sha256(content"),  # T8
        (" + repr(extra_keys).encode()", ""),
        ('array("q", token_ids).tobytes()', '"".join(map(str, token_ids)).encode()'),
    ),
    "11b-longest-hit": (
        ("block_hashes[:(num_tokens - 1) // block_size]", "block_hashes[:num_tokens // block_size]"),  # T3
        ("        if block_id is None:\n            break\n        block_ids.append(block_id)",
         "        if block_id is None:\n            continue\n        block_ids.append(block_id)"),
        ("        if block_id is None:\n            break\n", "        if block_id is None:\n            return []\n"),
    ),
    "11c-shared-blocks": (
        ("                del self.free_queue[block_id]\n", "                pass\n"),
        ("            del self.cached_blocks[block_hash][block_id]\n            if not self.cached_blocks[block_hash]:\n                del",
         "            if True:\n                del"),  # T4: the twin is forgotten
        ("            if not self.cached_blocks[block_hash]:\n                del self.cached_blocks[block_hash]\n", ""),
        ("            self.ref_counts[block_id] += 1", "            self.ref_counts[block_id] = 1"),
    ),
    "11d-allocate-slots": (
        ("        return num_missing + sum(self.pool.ref_counts[block_id] == 0 for block_id in new_computed_blocks)",
         "        return num_missing"),  # T7
        ("        self.pool.touch(new_computed_blocks)  # before anything is taken, or a hit could be handed out as a new block\n", ""),
        ("        num_missing = max(0, -(-num_tokens // self.block_size) - num_owned)",
         "        num_missing = max(0, num_tokens // self.block_size + 1 - num_owned)"),  # T18
        ("num_tokens = min(num_tokens + len(new_computed_blocks) * self.block_size, self.max_model_len)",
         "num_tokens += len(new_computed_blocks) * self.block_size"),
        ("get_new_blocks(-(-num_tokens // self.block_size) - len(table))", "get_new_blocks(-(-num_must_fit // self.block_size) - len(table))"),
        ("        self.pool.touch(new_computed_blocks)  # before anything is taken, or a hit could be handed out as a new block\n"
         "        table = self.block_tables.setdefault(request.request_id, list(new_computed_blocks))\n"
         "        self.num_cached_blocks.setdefault(request.request_id, len(new_computed_blocks))\n"
         "        new_blocks = self.pool.get_new_blocks(-(-num_tokens // self.block_size) - len(table))\n",
         "        table = self.block_tables.setdefault(request.request_id, list(new_computed_blocks))\n"
         "        self.num_cached_blocks.setdefault(request.request_id, len(new_computed_blocks))\n"
         "        new_blocks = self.pool.get_new_blocks(-(-num_tokens // self.block_size) - len(table))\n"
         "        self.pool.touch(new_computed_blocks)\n"),  # T6
    ),
    "12a-accepted-run": (
        ("    return list(sampled_token_ids[: num_right + 1])", "    return list(sampled_token_ids[:num_right])"),  # a step of wrong guesses brings nothing
        ("    num_right = next((index for index, (draft, sampled) in enumerate(pairs) if draft != sampled), len(draft_token_ids))",
         "    num_right = sum(draft == sampled for draft, sampled in pairs)"),  # right ones behind a wrong one count
        ("    return list(sampled_token_ids[: num_right + 1])", "    return [*draft_token_ids, sampled_token_ids[-1]][: num_right + 1]"),  # the wrong draft is said
        ('    assert len(sampled_token_ids) == len(draft_token_ids) + 1, "the model samples behind every draft, and behind the last"\n', ""),
    ),
    "12b-prompt-lookup": (
        ("        while start % width:\n            start = content.find(end, start + 1)\n", ""),  # a match that begins within a token
        ("        start = content.find(end)\n", "        start = content.rfind(end, 0, len(content) - width)\n"),  # the newest place
        ("range(min(longest, len(text) - 1), shortest - 1, -1)", "range(shortest, min(longest, len(text) - 1) + 1)"),
        ("            return list(text[following : following + num_tokens])", "            return list(text[following:])"),
    ),
    "12c-rejection-sampling": (
        ("draw_from((p - q).clamp(min=0), generator)", "draw_from(p, generator)"),  # the classic mistake
        ("        if chance * q[token_id] >= p[token_id]:", "        if chance >= p[token_id]:"),  # as if the draft had been certain
        ("        run.append(token_id)\n", "        run.append(token_id)\n        break\n"),
        ("    return [*run, draw_from(target_probs[-1], generator)]", "    return run or [draw_from(target_probs[-1], generator)]"),
    ),
    "13a-stop-strings": (
        ("text.find(stop, max(0, len(text) - num_new - len(stop) + 1))", "text.find(stop, max(0, len(text) - num_new))"),
        ("    return min(found)[1:] if found else None", "    return found[0][1:] if found else None"),  # the first of the list
        ("    longest = 0\n    for stop in stops:\n", "    longest = max([min(len(stop) - 1, len(text)) for stop in stops], default=0)\n    for stop in stops:\n"),
        ("range(min(len(stop) - 1, len(text)), longest, -1)", "range(min(len(stop), len(text)), longest, -1)"),
    ),
    "13b-streaming": (
        ("        text = self.stream.step(self.tokenizer, token_id)\n", "        text = self.decode([token_id])\n"),  # T43
        ("            self.waiting.clear()\n", ""),
        ("        return self._release() if len(self.waiting) >= MAX_WAITING_TOKENS else \"\"", "        return \"\""),
        ("        text = self.decode(self.waiting)\n        self._restart([])\n", "        text = \"\"\n        self._restart([])\n"),
    ),
    "13c-abort": (
        ("            if request.status is not RequestStatus.RUNNING:\n", "            if request.status is RequestStatus.WAITING:\n"),
        ("        self._release(ended)\n\n    def _release", "\n    def _release"),
        (" for request_id in request_ids if request_id in self.requests]", " for request_id in request_ids]"),
    ),
    "14-buckets": (
        ("[*(size for size in sizes if size < max_num_seqs), max_num_seqs]", "[size for size in sizes if size < max_num_seqs]"),
        ("*(size for size in sizes if size < max_num_seqs)", "*sizes"),  # larger than max_num_seqs
        ("if size >= num_requests)", "if size > num_requests)"),
        ("*range(128, 256, 16), ", ""),
    ),
}
