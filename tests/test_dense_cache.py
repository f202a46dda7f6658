"""The dense cache: what is appended stays, masks show the past of a row and nothing else, and garbage leaves no trace."""

from __future__ import annotations

import random
import tempfile

import pytest
import torch
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ids, load_ours, our_logits, random_qwen2, relative_error

from minivllm.config import ModelConfig
from minivllm.dense_cache import DenseCache, DenseMetadata, causal_mask
from minivllm.generate import dense_caches
from minivllm.model import attention

NAN = float("nan")
CONFIG = ModelConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=4, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64,
                     tie_word_embeddings=False)


def empty_cache(num_rows: int, max_len: int, garbage: float = 0.0) -> DenseCache:
    cache = DenseCache(num_rows, max_len, CONFIG, torch.float64, torch.device("cpu"))
    cache.keys.fill_(garbage)
    cache.values.fill_(garbage)
    return cache


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), unique=True, min_size=1, max_size=15), st.integers(0, 9))
def test_appended_tokens_lie_in_their_row_and_column(places, seed):
    """Each token's key and value lie in its row and column, whatever the order, and no other place has changed."""
    torch.manual_seed(seed)
    cache = empty_cache(3, 5, garbage=7.0)
    keys = cache.keys
    k, v = torch.randn(2, len(places), 2, 4, dtype=torch.float64)
    cache.append(k, v, torch.tensor([row * 5 + column for row, column in places]))
    for tensor, written in ((keys, k), (cache.values, v)):
        for token, (row, column) in enumerate(places):
            assert torch.equal(tensor[row, :, column], written[token]), f"token {token} is not in row {row}, column {column}"
        rest = sum(bool((tensor[row, :, column] == 7).all()) for row in range(3) for column in range(5))
        assert rest == 15 - len(places), f"{15 - rest} places changed when {len(places)} tokens were appended"


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4), st.integers(1, 4))
def test_a_query_sees_its_row_from_the_first_token_to_itself(rows, num_queries):
    """The mask shows the columns from the end of the padding to the query's own, and no other."""
    first = torch.tensor([padding for padding, _ in rows])
    columns = torch.tensor([[padding + past + i for i in range(num_queries)] for padding, past in rows])
    mask = causal_mask(columns, first)
    assert mask.shape[:2] == columns.shape, f"{tuple(columns.shape)} queries got a mask of shape {tuple(mask.shape)}"
    assert mask.shape[2] == columns.max() + 1, f"columns 0 to {columns.max()} got a mask of {mask.shape[2]} columns"
    for row, (padding, past) in enumerate(rows):
        for query in range(num_queries):
            seen = mask[row, query].nonzero().flatten().tolist()
            want = list(range(padding, padding + past + query + 1))
            assert seen == want, (
                f"row {row}: a query in column {want[-1]} after {padding} of padding sees {seen} instead of {want}")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 9))
def test_attending_equals_each_row_alone(rows, num_queries, seed):
    """A step over several rows, padded and of different lengths, gives each what it gets alone; NaN elsewhere is not seen."""
    torch.manual_seed(seed)
    max_len = 16
    cache = empty_cache(len(rows) + 1, max_len, garbage=NAN)
    metadata = DenseMetadata.build(
        torch.tensor([[padding + past + i for i in range(num_queries)] for padding, past in rows]),
        torch.tensor([padding for padding, _ in rows]), max_len, first_row=1)
    contexts = []
    for row, (padding, past) in enumerate(rows):
        k, v = torch.randn(2, past + num_queries, 2, 4, dtype=torch.float64)
        contexts.append((k.transpose(0, 1), v.transpose(0, 1)))
        cache.append(k, v, (row + 1) * max_len + padding + torch.arange(len(k)))
    q = torch.randn(len(rows) * num_queries, 4, 4, dtype=torch.float64)
    output = cache.attend(q, metadata).view(len(rows), num_queries, 4, 4)
    for row, (k, v) in enumerate(contexts):
        mask = torch.ones(num_queries, k.shape[1], dtype=torch.bool).tril(k.shape[1] - num_queries)
        alone = attention(q.view(len(rows), num_queries, 4, 4)[row].transpose(0, 1), k, v, mask).transpose(0, 1)
        error = relative_error(output[row], alone)
        assert error < 1e-12, f"row {row} (padding, past) = {rows[row]} is off by {error:.1e}"


def test_t29_appending_changes_the_cache_itself():
    """An append lands in the memory that was there before."""
    cache = empty_cache(2, 4)
    view = cache.keys[1]
    cache.append(torch.ones(2, 2, 4, dtype=torch.float64), torch.ones(2, 2, 4, dtype=torch.float64), torch.tensor([4, 6]))
    assert view[:, [0, 2]].eq(1).all(), "a view taken before the append does not show it: the cache was copied"


@settings(max_examples=examples(20))
@given(st.integers(1, 24), st.integers(0, 9))
def test_cached_logits_equal_recomputed_ones(num_tokens, seed):
    """A sequence fed in pieces of random sizes has, at every position, the logits of the whole sequence at once."""
    model = MODEL
    tokens, rng = ids(seed, num_tokens), random.Random(seed)
    caches, pieces, start = dense_caches(model, 1, num_tokens), [], 0
    while start < num_tokens:
        end = min(num_tokens, start + rng.randint(1, 5))
        positions = torch.arange(start, end)
        metadata = DenseMetadata.build(positions[None], torch.tensor([0]), num_tokens)
        pieces.append(model.compute_logits(model(tokens[start:end], positions, caches, metadata)))
        start = end
    error = relative_error(torch.cat(pieces), our_logits(model, tokens))
    assert error < 1e-12, f"{num_tokens} tokens in {len(pieces)} pieces: logits are off by {error:.1e}"


MODEL = load_ours(random_qwen2(tempfile.mkdtemp(), dtype=torch.float64)[1], torch.float64)


@pytest.mark.parametrize("breakage", ["the future is seen", "the offset is lost"])
def test_a_broken_mask_is_noticed(breakage, monkeypatch):
    """The comparison of logits fails when queries see too much, or when the mask forgets the tokens before this step."""
    from minivllm import dense_cache

    def broken(columns, first):
        mask = causal_mask(columns, first)
        if breakage == "the future is seen":
            return torch.ones_like(mask)
        return mask & (torch.arange(mask.shape[2]) >= columns[:, :1, None])
    monkeypatch.setattr(dense_cache, "causal_mask", broken)
    with pytest.raises(AssertionError, match="logits are off"):
        test_cached_logits_equal_recomputed_ones()
