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
from minivllm.compiled_model import CompiledModel, OneAndMany, compiling, first_half
from minivllm.flex_attention import FlexPagedAttention
from minivllm.model import NoCache
from minivllm.split_linear import FEW_TOKENS, MOST_TOKENS, SplitLinear, num_parts, split_linears

WIDTHS = st.tuples(st.sampled_from([(4, 2), (7, 1), (6, 3), (14, 2)]), st.sampled_from([32, 64, 96]), st.sampled_from([8, 16, 32]))


def make_model(widths: tuple = ((14, 2), 64, 16), layers: int = 1, seed: int = 0):
    """Float32, with heads whose numbers together are not the hidden size."""
    (heads, kv_heads), hidden, head_dim = widths
    _, folder = random_qwen2(tempfile.mkdtemp(), seed, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads,
                             head_dim=head_dim)
    return load_ours(folder, torch.float32)


class NoCacheOfHeads(NoCache):
    """As a compiled layer writes it: all heads at once, the last ones those of keys and values."""

    num_kv_heads = 2

    def write_heads(self, heads: torch.Tensor, slot_mapping: None) -> None:
        self.k, self.v = heads[:, -2 * self.num_kv_heads :].chunk(2, dim=1)

    def write_halves(self, first: torch.Tensor, second: torch.Tensor, slot_mapping: None) -> None:
        self.write_heads(torch.cat((first, second), dim=1)[None], slot_mapping)


@settings(max_examples=examples(25), deadline=None)
@given(WIDTHS, st.integers(0, 9999), st.integers(0, 400))
def test_the_layer_of_one_token_is_the_plain_layer(widths, seed, position):
    """For any shape and position: the same queries, the same keys and values kept, and the same x after attention."""
    model = make_model(widths, seed=seed)
    layer, (heads, _), head_dim = model.model.layers[0], widths[0], widths[2]
    generator = torch.Generator().manual_seed(seed)
    x, seen = torch.randn(1, widths[1], generator=generator), torch.randn(1, heads, head_dim, generator=generator)
    cos, sin = model.model.rotary_emb(torch.tensor([position]), x.dtype)
    plain, ours = NoCache(), NoCacheOfHeads()
    ours.num_kv_heads = widths[0][1]
    expected = layer.before_attention(x, cos, sin, plain, None), plain.k, plain.v, layer.after_attention(x, seen)
    split_linears(layer)
    q = one_token.before_attention(layer, x, cos, sin, ours, None)
    found = q, ours.k, ours.v, one_token.after_attention(layer, x, seen)
    for name, ours_, theirs in zip(("queries", "keys", "values", "x"), found, expected):
        assert ours_.shape == theirs.shape, f"{name} have the shape {tuple(ours_.shape)}, not {tuple(theirs.shape)}"
        error = relative_error(ours_, theirs)
        assert error < 1e-5, f"{name} differ from the plain layer's by {error:.1e}"


@settings(max_examples=examples(25), deadline=None)
@given(WIDTHS, st.integers(1, 12), st.integers(0, 9999))
def test_the_write_of_all_heads_is_the_plain_write(widths, num_tokens, seed):
    """For any shape and slots: the same queries, and the same cache everywhere but in the null block, which belongs to nobody."""
    block_size, num_blocks = 4, 9
    model = make_model(widths, seed=seed)
    layer, (_, kv_heads), head_dim = model.model.layers[0], widths[0], widths[2]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, widths[1], generator=generator)
    cos, sin = model.model.rotary_emb(torch.randint(400, (num_tokens,), generator=generator), x.dtype)
    slots = block_size + torch.randperm((num_blocks - 1) * block_size, generator=generator)[:num_tokens]
    before = torch.randn(2, kv_heads, num_blocks * block_size, head_dim, generator=generator)
    plain, ours = (FlexPagedAttention(before.clone(), block_size) for _ in range(2))
    expected, q = (function(layer, x, cos, sin, cache, slots) for function, cache in (
        (type(layer).before_attention, plain), (first_half(num_tokens), ours)))
    torch.testing.assert_close(q, expected, rtol=1e-5, atol=1e-5)
    kept, written = (cache.kv_cache[:, :, block_size:] for cache in (plain, ours))
    torch.testing.assert_close(written, kept, rtol=1e-5, atol=1e-5, msg="a key or a value is not where it belongs")
    untouched = torch.ones(num_blocks * block_size, dtype=bool).index_fill(0, slots, False)[block_size:]
    assert torch.equal(written[:, :, untouched], before[:, :, block_size:][:, :, untouched]), "others' keys or values were changed"


@settings(max_examples=examples(40), deadline=None)
@given(st.sampled_from([1, 2, 17, FEW_TOKENS, FEW_TOKENS + 1, MOST_TOKENS, MOST_TOKENS + 1]), st.integers(1, 40),
       st.integers(1, 40) | st.sampled_from([16, 32]), st.integers(0, 99))
def test_a_split_product_is_the_whole_product(num_rows, eighths, out_features, seed):
    """For any number of rows, columns, parts and blocks, on x (T, K) and on x (1, T, K)."""
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


@pytest.mark.parametrize(("in_features", "out_features", "expected"), [
    (48, 32, ["blocks", "blocks", "parts", "parts", "whole"]),  # two parts, as 7B's
    (48, 24, ["parts", "parts", "parts", "parts", "whole"]),  # columns that two aligned blocks do not divide
    (64, 32, ["parts", "parts", "parts", "parts", "whole"]),  # four, as 0.5B's
    (24, 32, ["whole"] * 5)])
def test_the_number_of_rows_says_which_way_a_product_is_cut(in_features, out_features, expected, monkeypatch):
    """Two parts become two blocks of columns for few rows; each form gives the whole product."""
    linear, ways = torch.nn.Linear(in_features, out_features, bias=False), []
    for form in ("blocks", "parts"):
        own = getattr(SplitLinear, f"by_{form}")
        monkeypatch.setattr(SplitLinear, f"by_{form}",
                            lambda self, rows, own=own, form=form: (ways.append(form), own(self, rows))[1])
    for place, num_rows in enumerate((2, FEW_TOKENS, FEW_TOKENS + 1, MOST_TOKENS, MOST_TOKENS + 1)):
        x = torch.randn(num_rows, in_features)
        torch.testing.assert_close(SplitLinear(linear)(x), linear(x), rtol=1e-5, atol=1e-5)
        ways.extend(["whole"] * (len(ways) == place))
    assert ways == expected


@pytest.mark.parametrize("num_tokens", [1, 2, 9])
def test_the_regions_put_together_are_the_model(num_tokens):
    """Opening, layers in between and closing, uncompiled, give the plain model's hidden states, for one token and for many."""
    model = make_model(layers=3)
    ids, positions = torch.arange(3, 3 + num_tokens), torch.arange(num_tokens)
    metadata = SimpleNamespace(slot_mapping=None)
    expected = model(ids, positions, [NoCache() for _ in range(3)], metadata)
    with torch.compiler.set_stance("force_eager"):
        found = CompiledModel(model)(ids, positions, [NoCacheOfHeads() for _ in range(3)], metadata)
    error = relative_error(found, expected)
    assert error < 1e-5, f"hidden states of {num_tokens} tokens differ by {error:.1e}"


@pytest.mark.parametrize("num_tokens", [MOST_TOKENS, MOST_TOKENS + 1, 2 * MOST_TOKENS + 3])
def test_many_tokens_leave_the_model_no_more_at_a_time_than_a_decode_step_has(num_tokens, monkeypatch):
    """All tokens of a long step get their hidden states, and nothing has to be compiled for so many."""
    model, sizes = make_model(layers=2), []
    ids, positions = torch.arange(num_tokens) % 50, torch.arange(num_tokens)
    metadata = SimpleNamespace(slot_mapping=None)
    expected = model(ids, positions, [NoCache() for _ in range(2)], metadata)
    compiled = CompiledModel(model)
    closing = compiled.closing
    monkeypatch.setattr(compiled, "closing", lambda count, *args: (sizes.append(count), closing(count, *args))[1])
    with torch.compiler.set_stance("force_eager"):
        found = compiled(ids, positions, [NoCacheOfHeads() for _ in range(2)], metadata)
    assert found.shape == expected.shape and relative_error(found, expected) < 1e-5
    assert sum(sizes) == num_tokens and max(sizes) <= MOST_TOKENS


@pytest.mark.parametrize("wanted", [[], [8], [0, 8], [4, 4, 1]])
def test_only_the_wanted_tokens_leave_the_model(wanted):
    """The hidden states that were asked for are those of the same tokens when all are, in the plain model and in the regions."""
    model = make_model(layers=3)
    ids, positions, metadata = torch.arange(3, 12), torch.arange(9), SimpleNamespace(slot_mapping=None)
    index = torch.tensor(wanted, dtype=torch.int64)
    expected = model(ids, positions, [NoCache() for _ in range(3)], metadata)[index]
    plain = model(ids, positions, [NoCache() for _ in range(3)], metadata, index)
    with torch.compiler.set_stance("force_eager"):
        compiled = CompiledModel(model)(ids, positions, [NoCacheOfHeads() for _ in range(3)], metadata, index)
    for name, found in (("plain", plain), ("compiled", compiled)):
        assert found.shape == expected.shape, f"{name}: {tuple(found.shape)} for {len(wanted)} tokens"
        assert not wanted or relative_error(found, expected) < 1e-5, f"{name}: hidden states of the tokens {wanted} differ"


def test_sums_are_cut_so_that_programs_are_small_and_not_too_many():
    """A step of one token takes the weights of each of Qwen2.5's products in tiles that were measured; the rest is torch's."""
    from sympy import Integer, Symbol

    from minivllm.row_tiles import RowTiles

    def tiles(*axes) -> tuple[int, int] | None:
        names = ("x", "r0_") if len(axes) == 2 else ("y", "x", "r0_")
        chosen = RowTiles().triton_kernel_kwargs(None, None, [dict(zip(names, axes))], {})
        if chosen and axes[-1].is_number and int(axes[-1]) <= chosen["fixed_config"]["R0_BLOCK"]:
            is_norm = chosen["fixed_config"]["num_warps"] == 16
            assert chosen["override_persistent_reduction"] != is_norm, "whole rows are no loop: their weights are asked for at once"
        return tuple(chosen["fixed_config"][name] for name in ("XBLOCK", "R0_BLOCK", "num_warps")) if chosen else None

    for rows, length, expected in (
            (18_944, 3584, (1, 512)), (3584, 18_944, (1, 512)), (2304, 3584, (1, 512)), (152_064, 3584, (1, 512)),  # 7B
            (8960, 1536, (1, 512)), (1536, 8960, (1, 1024)), (1536, 1536, (1, 512)), (151_936, 1536, (4, 2048)),  # 1.5B
            (4864, 896, (4, 1024)), (896, 4864, (1, 8192)), (151_936, 896, (4, 1024)),  # 0.5B
            (576, 896, None), (896, 896, (4, 1024)),
            (3584, 16, None), (7168, 8, None), (152_064, 64, None)):  # the parts of an attention, of a vocabulary
        found = tiles(Integer(rows), Integer(length))
        expected = expected and (*expected, 4)
        assert found == expected, f"a program takes (rows, numbers, warps) {found} of {rows} sums of {length}, not {expected}"
    for some, rows in (("one norm", Integer(1)), ("norms of several tokens", Symbol("s0"))):
        assert tiles(rows, Integer(3584)) == (1, 4096, 16), f"{some}: torch would time two kernels, and take either"
        for length in (896, 1536, 2374, 2376, 5120, 18_944):  # of smaller models, parts of a vocabulary, not measured
            assert tiles(rows, Integer(length)) is None, f"{some}: {length} numbers are left to torch's rules"
    assert tiles(Integer(8), Integer(512), Integer(3584)) is None, "three axes are not rows"


def test_t35_two_functions_serve_any_number_of_tokens(monkeypatch):
    """One for a single token, one for all others: also where their number is some other size, or an odd float is about."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    compile_for_real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, dynamic, options=None: compile_for_real(
        function, dynamic=dynamic, backend=counter))
    norm = torch.nn.RMSNorm(16, eps=0.37).requires_grad_(False)

    def region(norm: torch.nn.RMSNorm, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return norm(x) * norm.eps + seen.sum(1)

    both = OneAndMany(region)
    torch._dynamo.reset()
    with torch.inference_mode(), compiling():
        for num_tokens in (16, 1, 4, 2, 300):  # as many as a line is long, and as a token has heads
            x, seen = torch.randn(num_tokens, 16), torch.randn(num_tokens, 4, 16)
            assert torch.allclose(both(num_tokens, norm, x, seen), region(norm, x, seen), atol=1e-6)
    assert counter.frame_count == 2, f"{counter.frame_count} functions were compiled, not one for a token and one for more"


def test_what_is_compiled_has_our_settings_as_long_as_they_are_asked_for():
    """Within `compiling` torch's compiler asks `RowTiles`, times no kernels and takes floats as constants; afterwards as before."""
    import gc

    from torch._inductor import config
    from torch._inductor.virtualized import V

    from minivllm.row_tiles import RowTiles

    def settings() -> tuple[bool, ...]:
        return (getattr(V.choices.triton_kernel_kwargs, "__func__", None) is RowTiles.triton_kernel_kwargs,
                not config.triton.autotune_pointwise, config.test_configs.force_filter_reduction_configs,
                torch._dynamo.config.specialize_float, not gc.isenabled())

    before = settings()
    assert not before[0]
    with compiling():
        for moment in ("at once", "once a function is compiled"):  # which sets some of torch's own settings back
            assert settings() == (True,) * 5, f"{moment}: (tiles, no timing, of sums neither, constants, no collector)"
            torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
    with pytest.raises(KeyError), compiling():
        raise KeyError
    assert settings() == before, "the host program's own functions would be compiled with our settings"
    gc.disable()
    try:
        with compiling():
            pass
        assert not gc.isenabled(), "a collector that was off must stay off"
    finally:
        gc.enable()
