"""Lesson 4. Choosing a token: a pure function of logits, parameters, seed and position.

Owns the way from a row of logits to one token id. Knows no request and no batch: a row's token is the same alone, among
others, after a preemption or on a padded graph. Chance is not a generator with a state but a hash, so nothing has to be
kept, restored or drawn in order. Nothing here makes the host wait for the device.

    logits -> allowed ids, bad words, min_tokens, logit_bias, penalties     what may come, and what is less welcome
           -> temperature -> top_k -> top_p -> min_p                        Hugging Face's order
           -> argmax(logits - log(noise(seed, position, id)))               the draw: of a part, then of a token in it

vLLM (v1/sample/sampler.py) applies min_p before top_k and top_p. The results differ only where min_p meets top_p: there,
top_p sees the tokens that min_p would have removed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minivllm.sampling_metadata import ANY_TOKEN, BadWords, EarlyStops, SamplingMetadata, TokenBias

MASK_31 = 0x7FFFFFFF
STREAMS = (0x9E3779B9 - 2**32, 0x7F4A7C15)  # two from one seed, as int32
NEVER = float("-inf")  # the logit of a token that can't be chosen
# Rows are taken as many at a time as stay in a CPU's cache: 64 rows of 151,936 then take less than half the time. On a GPU 441 of
# these, so that putting them in order does not take the KV cache's memory: guesses make it k + 1 rows a request.
LOGITS_AT_ONCE = {"cpu": 2**18, "cuda": 2**26}
PART = 64  # tokens drawn from together: few enough for a compiled kernel to hold a part at once, and a divisor of real vocabularies
SMALLEST_NORMAL, LOWEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).min


def sample(logits: Tensor, metadata: SamplingMetadata) -> Tensor:
    """One token id (R,) for each row of logits (R, V). The logits stay as they are.

    Everything is computed in float32: so are Hugging Face's scores, also where the model runs in float64 or bfloat16.
    """
    logits = mask_and_bias(logits.float(), metadata)
    num_rows, vocab_size = logits.shape
    at_once = max(1, LOGITS_AT_ONCE[logits.device.type] // vocab_size)
    if num_rows <= at_once:
        return choose(logits, metadata)
    chunks = [slice(start, start + at_once) for start in range(0, num_rows, at_once)]
    return torch.cat([choose(logits[rows], metadata.rows(rows)) for rows in chunks])


def choose(logits: Tensor, metadata: SamplingMetadata) -> Tensor:
    """From the logits (R, V) of what may come to token ids (R,): penalties, then the largest logit or a draw."""
    if metadata.has_penalties:
        logits = apply_penalties(logits, metadata)
    greedy = logits.argmax(dim=-1)
    if metadata.all_greedy:
        return greedy
    few = candidates(logits, metadata) if metadata.has_top_k and logits.device.type == "cpu" else None
    drawn = draw_from_few(*few, metadata, logits.shape[-1]) if few is not None else (
        draw(warp(logits, metadata), seed_keys(metadata.seeds), metadata.positions))
    return torch.where(metadata.temperature == 0, greedy, drawn)


def sample_plain(logits: Tensor, temperature: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
    """`sample` for rows (R,) that ask for a temperature, not a tiny one: the same tokens, in a form that compiles to fast kernels.

    No shift by the largest logit: temperatures are not tiny here, and finding it would mean to read all logits twice.
    """
    is_greedy = (temperature == 0)[:, None]
    return draw(logits.float() * (1 / temperature[:, None].masked_fill(is_greedy, 1)), keys, positions, 1.0 - is_greedy.float())


# What may come


def mask_and_bias(logits: Tensor, metadata: SamplingMetadata) -> Tensor:
    """-inf for the tokens that may not come, then logit_bias."""
    if metadata.allowed_mask is not None:
        logits = logits.masked_fill(~metadata.allowed_mask, NEVER)
    if metadata.bad_words is not None:
        logits = ban_bad_words(logits, metadata.bad_words, metadata.token_ids, metadata.positions)
    if metadata.early_stops is not None:
        logits = ban_early_stops(logits, metadata.early_stops, metadata.positions)
    if metadata.bias is not None:
        logits = add_at(logits, metadata.bias)
    return logits


def add_at(logits: Tensor, bias: TokenBias) -> Tensor:
    """Add values[i] to logits[rows[i], ids[i]]; -inf bans a token, and entries for the same token add up."""
    return logits.index_put((bias.rows, bias.ids), bias.values.to(logits.dtype), accumulate=True)


def ban_early_stops(logits: Tensor, stops: EarlyStops, positions: Tensor) -> Tensor:
    """min_tokens: a row that has not reached its position `until` can't sample a token that would end it."""
    values = torch.where(positions[stops.rows] < stops.until, NEVER, 0.0)
    return add_at(logits, TokenBias(stops.rows, stops.ids, values))


def ban_bad_words(logits: Tensor, words: BadWords, token_ids: Tensor, positions: Tensor) -> Tensor:
    """Ban the last token of each of W bad words whose other tokens are the newest of its row.

    The prompt counts, as in Hugging Face (in vLLM only the output does): a word begun there can't be completed either.
    """
    length = words.prefixes.shape[1]
    columns = positions[words.rows, None] + torch.arange(-length, 0, device=logits.device)  # (W, length)
    newest = token_ids[words.rows[:, None], columns.clamp(min=0)]  # (W, length), a copy
    is_match = (newest == words.prefixes) & (columns >= 0) | (words.prefixes == ANY_TOKEN)
    values = torch.where(is_match.all(dim=-1), NEVER, 0.0)
    return add_at(logits, TokenBias(words.rows, words.last, values))


# What is less welcome


def apply_penalties(logits: Tensor, metadata: SamplingMetadata) -> Tensor:
    """Repetition penalty over prompt and output, then presence and frequency penalties over the output alone.

    Only the logits of tokens that have come can change. They are taken out, changed and put back: V is longer than a history.
    """
    token_ids, positions = metadata.token_ids, metadata.positions[:, None]
    columns = torch.arange(token_ids.shape[1], device=token_ids.device)
    is_output = (columns < positions) & (columns >= metadata.prompt_lens[:, None])  # (R, L)
    counts = count_tokens(token_ids, is_output, logits.shape[-1])
    ids = torch.where(columns < positions, token_ids, token_ids[:, :1])  # who stands there twice comes back the same twice
    known = repetition_penalty(logits.gather(1, ids), positions > 0, metadata.repetition_penalty)  # (R, L)
    known = output_penalties(known, counts.gather(1, ids), metadata.presence_penalty, metadata.frequency_penalty)
    return logits.scatter(1, ids, known)


def count_tokens(token_ids: Tensor, mask: Tensor, vocab_size: int) -> Tensor:
    """(R, V): how often each token stands in its row of token_ids (R, L) where the mask is True."""
    counts = torch.zeros(token_ids.shape[0], vocab_size, device=token_ids.device)
    return counts.scatter_add_(1, token_ids.masked_fill(~mask, 0), mask.float())


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Make each token of prompt or output less likely, once: a negative logit is multiplied by penalty (R,), others divided."""
    penalty = penalty[:, None]
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def output_penalties(logits: Tensor, counts: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    """Subtract presence (R,) from tokens that the output has (counts (R, V)), and frequency (R,) for each time it has them."""
    return logits - frequency[:, None] * counts - presence[:, None] * (counts > 0)


# How bold the choice is


def warp(logits: Tensor, metadata: SamplingMetadata) -> Tensor:
    """Temperature, top_k, top_p, min_p, each on what the one before has left. softmax of the result is what is drawn from."""
    logits = apply_temperature(logits, metadata.temperature)
    if metadata.has_top_k:
        logits = top_k(logits, metadata.top_k, metadata.top_k_width)
    if metadata.has_top_p:
        logits = top_p(logits, metadata.top_p, metadata.top_p_width)
    if metadata.has_min_p:
        logits = min_p(logits, metadata.min_p)
    return logits


def apply_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """Divide each row by its temperature (R,), after shifting its largest logit to 0: the smallest temperature can't overflow.

    A row at 0 is greedy and not drawn from; it is divided by the smallest normal number like any other that small.
    """
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    return shifted / temperature.clamp(min=SMALLEST_NORMAL)[:, None]


def top_k(logits: Tensor, k: Tensor, width: int | None = None) -> Tensor:
    """Keep the k (R,) largest logits of each row, and whatever ties with the k-th; the rest becomes -inf.

    k lies in 1..V, and V keeps everything. No k below V is larger than `width` (V if None): so few have to be sorted.
    """
    vocab_size = logits.shape[-1]
    ordered = largest(logits, vocab_size if width is None else width)  # (R, width), descending
    kth = ordered.gather(-1, k.clamp(max=ordered.shape[-1])[:, None] - 1)  # (R, 1)
    return logits.masked_fill(logits < kth.masked_fill((k >= vocab_size)[:, None], NEVER), NEVER)


def top_p(logits: Tensor, p: Tensor, width: int | None = None) -> Tensor:
    """Keep the most likely tokens of each row until their probabilities sum to p (R,) or more; the rest becomes -inf.

    The token that crosses p stays, so at least one does, and so does whatever ties with it. p = 1 keeps everything.
    Where p is below 1, nothing below a row's `width`-th (V-th if None) largest logit may be above -inf: top_k saw to it.
    """
    ordered = largest(logits, logits.shape[-1] if width is None else width)  # (R, width), descending
    weights, total = token_weights(ordered), token_weights(logits).sum(dim=-1, keepdim=True)
    before = weights.cumsum(dim=-1) - weights  # what the likelier tokens sum to
    is_kept = before.double() < p[:, None].double() * total
    is_kept[:, 0] = True  # the likeliest, also where p is too small for a float32
    smallest = ordered.masked_fill(~is_kept, float("inf")).amin(dim=-1, keepdim=True)  # (R, 1)
    return logits.masked_fill(logits < smallest.masked_fill((p >= 1)[:, None], NEVER), NEVER)


def min_p(logits: Tensor, p: Tensor) -> Tensor:
    """Keep the tokens that are at least p (R,) times as likely as their row's likeliest; the rest becomes -inf."""
    smallest = logits.amax(dim=-1, keepdim=True) + p.log()[:, None]  # the logarithm of a product
    return logits.masked_fill(logits < smallest, NEVER)


def largest(logits: Tensor, num: int) -> Tensor:
    """The `num` largest logits of each row in descending order: for 20 of 151,936 thirty times faster than a sort."""
    return logits.topk(num).values if num < logits.shape[-1] else logits.sort(dim=-1, descending=True).values


def token_weights(logits: Tensor) -> Tensor:
    """Each token's probability times a number common to its row, as an integer: 2**40 for the likeliest.

    Integers sum to the same in every order. Sums of floats depend on how a kernel splits a row, which depends on the
    number of rows, and a token on the border of top_p would come and go with the batch.
    """
    relative = (logits - logits.amax(dim=-1, keepdim=True).clamp(min=LOWEST)).exp()  # 0 where nothing may come
    return (relative * 2.0**40).long()  # 2**23 tokens fit in 63 bits


# The draw


def draw(logits: Tensor, keys: Tensor, positions: Tensor, luck: Tensor | float = 1.0) -> Tensor:
    """One token (R,) for each row, token i with the probability softmax(logits)[i]. keys (R, 2) are `seed_keys`. First a part of
    the vocabulary, as likely as its tokens together, then one of these: chance has to be made up for each part and for the tokens
    of one, not for 150,000. Where luck (R, 1) is 0 and not 1, it is the largest logit.
    """
    keys, vocab_size = at_position(keys, positions), logits.shape[-1]
    parts = logits.unflatten(-1, (-1, math.gcd(vocab_size, PART)))  # (R, P, size)
    num_parts, size = parts.shape[1:]
    total = (token_weights(parts).sum(dim=-1).clamp(min=1) * 2.0**-40).log()  # (R, P), beside the part's largest logit
    # A part's noise is that of an id behind the last token's.
    part_ids = torch.arange(vocab_size, vocab_size + num_parts, dtype=torch.int32, device=logits.device)
    part = race(parts.amax(dim=-1) + luck * total, keys, part_ids, luck)  # (R,)
    token_ids = part[:, None] * size + torch.arange(size, device=logits.device)  # (R, size)
    return part * size + race(logits.gather(-1, token_ids), keys, token_ids.int(), luck)


def candidates(logits: Tensor, metadata: SamplingMetadata) -> tuple[Tensor, Tensor] | None:
    """The largest logits of each row and their ids, (R, n) each, if no row can draw anything else; None if one can.

    That is so where all who draw have a top_k, and no logit beyond the n-th ties with their k-th. The host looks: not for a GPU.
    """
    width, vocab_size = metadata.top_k_width, logits.shape[-1]
    values, ids = logits.topk(min(width + 1, vocab_size))
    kth = values.gather(-1, metadata.top_k.clamp(max=width)[:, None] - 1)
    is_whole = (metadata.top_k <= width) & (values[:, -1:] < kth)[:, 0] | (metadata.temperature == 0)
    return (values, ids) if is_whole.all() else None


def draw_from_few(logits: Tensor, ids: Tensor, metadata: SamplingMetadata, vocab_size: int) -> Tensor:
    """What `draw` draws where all other logits are -inf: the same sums and the same noise, for the parts that are not empty.

    Of 33 candidates and not of 151,936 logits, a row takes 1.6 ms on a CPU and not 6.
    """
    logits, keys = warp(logits, metadata), at_position(seed_keys(metadata.seeds), metadata.positions)
    size = math.gcd(vocab_size, PART)
    part = ids // size  # (R, n)
    is_beside = part[:, :, None] == part[:, None, :]  # (R, n, n)
    beside = torch.where(is_beside, logits[:, None, :], NEVER)  # for each candidate, who stands in its part
    total = (token_weights(beside).sum(dim=-1).clamp(min=1) * 2.0**-40).log()  # (R, n)
    winner = race(beside.amax(dim=-1) + total, keys, (vocab_size + part).int(), 1.0)[:, None]  # any candidate of the part
    drawn = race(torch.where(part == part.gather(1, winner), logits, NEVER), keys, ids.int(), 1.0)
    return ids.gather(1, drawn[:, None])[:, 0]


def race(logits: Tensor, keys: Tensor, ids: Tensor, luck: Tensor | float) -> Tensor:
    """One of n (R,) for each row (R, n), number i with the probability softmax(logits)[i].

    The smallest of independent exponential variables of rates p_i is number i with probability p_i. E / p_i is such a
    variable if E has rate 1, and to compare logarithms spares the softmax: log p_i is the logit but for a constant.
    """
    return (logits - luck * noise_of(keys, ids).log()).argmax(dim=-1)


def noise_of(keys: Tensor, ids: Tensor) -> Tensor:
    """(R, n) exponential variables of rate 1, each a hash of its row's keys (R, 2) and of its id, (n,) or (R, n) int32.

    Winners are tiny: so v = (31 bits of hash + 1/2) / 2**31 is turned into -log(1 - v), exact near 0; v is kept below 1.
    """
    bits = hash32(ids * (keys[:, :1] | 1) + keys[:, 1:]) & MASK_31  # the multiplier is odd: no two ids meet
    share = ((bits.float() + 0.5) * 2.0**-31).clamp(max=1 - 2.0**-24)
    # log(1 - v) by its first terms where 1 - v would lose the digits of v.
    return torch.where(share < 2.0**-10, share + 0.5 * share * share, -torch.log(1 - share))


def seed_keys(seeds: Tensor) -> Tensor:
    """(R, 2) int32: two numbers for each row that change with every bit of its 64-bit seed."""
    keys = torch.stack([seeds.int() ^ stream for stream in STREAMS], dim=-1)
    return hash32(hash32(keys) ^ (seeds >> 32).int()[:, None])


def at_position(keys: Tensor, positions: Tensor) -> Tensor:
    """(R, 2) int32: `seed_keys` as they are at these positions (R,), other numbers at each."""
    return hash32(keys ^ positions.int()[:, None])


def hash32(x: Tensor) -> Tensor:
    """Scramble 32-bit numbers: each bit in flips half of the bits out. int32, whose products wrap around; the masks make each
    shift an unsigned one. The rounds are those of Wellons' hash-prospector; integers are the same on every device.
    """
    x = (x ^ (x >> 16) & 0xFFFF) * 0x21F0AAAD
    x = (x ^ (x >> 15) & 0x1FFFF) * 0x735A2D97
    return x ^ (x >> 15) & 0x1FFFF
