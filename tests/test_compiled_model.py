"""Layers written for a GPU compute what the plain layer computes; what torch.compile makes of them: test_gpu_graphs.py."""

from __future__ import annotations

import tempfile
from types import SimpleNamespace

import pytest
import torch
from depth import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import load_ours, random_qwen2, relative_error

from minivllm import one_token
from minivllm.compiled_model import CompiledModel, small_tiles
from minivllm.model import NoCache
from minivllm.split_linear import MOST_TOKENS, SplitLinear, num_parts, split_linears

WIDTHS = st.tuples(st.sampled_from([(4, 2), (7, 1), (6, 3), (14, 2)]), st.sampled_from([32, 64, 96]), st.sampled_from([8, 16, 32]))


def make_model(widths: tuple = ((14, 2), 64, 16), layers: int = 1, seed: int = 0):
    """Float32, with heads whose numbers together are not the hidden size."""
    (heads, kv_heads), hidden, head_dim = widths
    _, folder = random_qwen2(tempfile.mkdtemp(), seed, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads,
                             head_dim=head_dim)
    return load_ours(folder, torch.float32)


@settings(max_examples=examples(25), deadline=None)
@given(WIDTHS, st.integers(0, 9999), st.integers(0, 400))
def test_the_layer_of_one_token_is_the_plain_layer(widths, seed, position):
    """For any shape and position: the same queries, the same keys and values kept, and the same x after attention."""
    model = make_model(widths, seed=seed)
    layer, (heads, _), head_dim = model.model.layers[0], widths[0], widths[2]
    generator = torch.Generator().manual_seed(seed)
    x, seen = torch.randn(1, widths[1], generator=generator), torch.randn(1, heads, head_dim, generator=generator)
    cos, sin = model.model.rotary_emb(torch.tensor([position]), x.dtype)
    plain, ours = NoCache(), NoCache()
    expected = layer.before_attention(x, cos, sin, plain, None), plain.k, plain.v, layer.after_attention(x, seen)
    split_linears(layer)
    q = one_token.before_attention(layer, x, cos, sin, ours, None)
    found = q, ours.k, ours.v, one_token.after_attention(layer, x, seen)
    for name, ours_, theirs in zip(("queries", "keys", "values", "x"), found, expected):
        assert ours_.shape == theirs.shape, f"{name} have the shape {tuple(ours_.shape)}, not {tuple(theirs.shape)}"
        error = relative_error(ours_, theirs)
        assert error < 1e-5, f"{name} differ from the plain layer's by {error:.1e}"


@settings(max_examples=examples(40), deadline=None)
@given(st.sampled_from([1, 2, 17, MOST_TOKENS, MOST_TOKENS + 1]), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_a_split_product_is_the_whole_product(num_rows, eighths, out_features, seed):
    """For any number of rows, columns and parts, on x (T, K) and on x (1, T, K)."""
    torch.manual_seed(seed)
    linear = torch.nn.Linear(8 * eighths, out_features, bias=False)
    x = torch.randn(num_rows, 8 * eighths)
    split = SplitLinear(linear)
    assert eighths % split.parts == 0
    torch.testing.assert_close(split(x), linear(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(split(x[None])[0], split(x)), "an axis more changes nothing"


def test_products_are_cut_as_far_as_there_are_processors():
    """The projections of the published shapes: 0.5B and 1.5B in four parts, 7B in two; odd lengths in as many as are equal."""
    shapes = {"0.5B o": (896, 896), "0.5B down": (4864, 896), "1.5B down": (8960, 1536), "7B o": (3584, 3584),
              "7B down": (18_944, 3584), "7B gate_up": (3584, 37_888), "odd": (8 * 3, 64), "twice odd": (16 * 3, 64)}
    expected = {"0.5B o": 4, "0.5B down": 4, "1.5B down": 4, "7B o": 2, "7B down": 2, "7B gate_up": 1, "odd": 1, "twice odd": 2}
    assert {name: num_parts(*shape) for name, shape in shapes.items()} == expected


@pytest.mark.parametrize("num_tokens", [1, 2, 9])
def test_the_regions_put_together_are_the_model(num_tokens):
    """Opening, layers in between and closing, uncompiled, give the plain model's hidden states, for one token and for many."""
    model = make_model(layers=3)
    ids, positions = torch.arange(3, 3 + num_tokens), torch.arange(num_tokens)
    metadata = SimpleNamespace(slot_mapping=None)
    expected = model(ids, positions, [NoCache() for _ in range(3)], metadata)
    with torch.compiler.set_stance("force_eager"):
        found = CompiledModel(model)(ids, positions, [NoCache() for _ in range(3)], metadata)
    error = relative_error(found, expected)
    assert error < 1e-5, f"hidden states of {num_tokens} tokens differ by {error:.1e}"


@pytest.mark.parametrize("wanted", [[], [8], [0, 8], [4, 4, 1]])
def test_only_the_wanted_tokens_leave_the_model(wanted):
    """The hidden states that were asked for are those of the same tokens when all are, in the plain model and in the regions."""
    model = make_model(layers=3)
    ids, positions, metadata = torch.arange(3, 12), torch.arange(9), SimpleNamespace(slot_mapping=None)
    index = torch.tensor(wanted, dtype=torch.int64)
    expected = model(ids, positions, [NoCache() for _ in range(3)], metadata)[index]
    plain = model(ids, positions, [NoCache() for _ in range(3)], metadata, index)
    with torch.compiler.set_stance("force_eager"):
        compiled = CompiledModel(model)(ids, positions, [NoCache() for _ in range(3)], metadata, index)
    for name, found in (("plain", plain), ("compiled", compiled)):
        assert found.shape == expected.shape, f"{name}: {tuple(found.shape)} for {len(wanted)} tokens"
        assert not wanted or relative_error(found, expected) < 1e-5, f"{name}: hidden states of the tokens {wanted} differ"


def test_long_sums_are_cut_into_small_tiles():
    """Every row that 512 divides, as all of 7B's, is taken 512 numbers at a time; the rest is torch's choice."""
    from sympy import Integer, Symbol

    from minivllm.row_tiles import RowTiles

    def tiles(*axes) -> dict | None:
        names = ("x", "r0_") if len(axes) == 2 else ("y", "x", "r0_")
        chosen = RowTiles().triton_kernel_kwargs(None, None, [dict(zip(names, axes))], {})
        return chosen["fixed_config"].config if chosen else None

    for rows, length in ((18_944, 3584), (3584, 18_944), (2304, 3584), (152_064, 3584), (1536, 1536)):
        config = tiles(Integer(rows), Integer(length))
        assert (config["XBLOCK"], config["R0_BLOCK"]) == (1, 512), f"{rows} sums of {length}: {config}"
    for rows, length in ((4864, 896), (896, 4864), (151_936, 896), (1536, 8960), (3584, 16)):
        assert tiles(Integer(rows), Integer(length)) is None, f"the last tile of a row of {length} numbers would be part empty"
    assert tiles(Integer(1), Integer(3584)) is None, "one sum, a norm, wants all threads of a processor"
    assert tiles(Symbol("s0"), Integer(3584)) is None, "a step of several tokens has norms, and the library's products"
    assert tiles(Integer(8), Integer(512), Integer(3584)) is None, "three axes are not rows"


def test_small_tiles_are_chosen_as_long_as_they_are_asked_for():
    """Within `small_tiles` torch's compiler asks `RowTiles`, and behind it whoever it asked before."""
    from torch._inductor.virtualized import V

    from minivllm.row_tiles import RowTiles

    def asks_us() -> bool:
        return getattr(V.choices.triton_kernel_kwargs, "__func__", None) is RowTiles.triton_kernel_kwargs

    assert not asks_us()
    with small_tiles():
        assert asks_us(), "what is compiled here has other tiles"
    assert not asks_us(), "the host program's own functions would be compiled with our tiles"
