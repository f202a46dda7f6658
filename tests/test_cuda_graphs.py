"""Lesson 14, the part without a GPU: into which captured batch size a batch goes (graphs themselves: test_gpu_graphs.py)."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivllm import cuda_graphs
from minivllm.bench.cost_floor import on_an_engines_stream
from minivllm.cuda_graphs import bucket_of, bucket_sizes, next_stream


@pytest.mark.parametrize("most", [1, 2, 3, 17, 64, 65, 200, 256, 1000])
def test_t32_every_batch_size_has_a_bucket_and_no_bucket_is_too_large(most):
    """For any max_num_seqs the buckets ascend, each is there once, and the largest is max_num_seqs."""
    buckets = bucket_sizes(most)
    assert buckets == sorted(set(buckets)) and buckets[-1:] == [most], f"buckets of max_num_seqs={most}: {buckets}"
    assert buckets[0] >= 1, f"a bucket of {buckets[0]} holds nobody"
    assert len(bucket_sizes(256)) <= 17, f"256 have {len(bucket_sizes(256))} buckets; each costs a compilation at start"


@given(st.integers(1, 700), st.integers(0, 10_000))
def test_a_batch_goes_into_the_smallest_bucket_that_holds_it(most, number):
    """A batch gets the smallest bucket that is not smaller than itself."""
    count = 1 + number % most
    size = bucket_of(count, most)
    fitting = [bucket for bucket in bucket_sizes(most) if bucket >= count]
    assert size == min(fitting), f"{count} of at most {most} requests go into a bucket of {size}, the smallest is {min(fitting)}"


@given(st.integers(1, 700))
def test_padding_stays_small(most):
    """A batch is never padded beyond twice its size, nor by 32 rows or more up to 128, by 16 up to 256, by 64 beyond."""
    for count in range(1, most + 1):
        padding = bucket_of(count, most) - count
        bound = min(count + 1, 32) if count <= 128 else 16 if count <= 256 else 64
        assert padding < bound, f"{count} of at most {most} requests: {padding} rows of padding, fewer than {bound} are allowed"


def test_an_engine_takes_the_stream_of_a_closed_one(monkeypatch):
    """No two living engines have one stream, and a new one is made only where none is idle: libraries keep memory for each."""
    monkeypatch.setattr(cuda_graphs, "IDLE_STREAMS", set())
    assert next_stream("cpu") is None, "a CPU has no streams"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert next_stream("auto") is None, "without a GPU there is none either"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    first = next_stream("cuda")
    assert first is not None and next_stream("auto") is first, "a start that fails leaves its stream to the next"
    cuda_graphs.IDLE_STREAMS.discard(first)  # as a start does that succeeds
    second = next_stream("cuda")
    assert second not in (None, first), "two engines, two streams"
    assert next_stream("cpu:0") is None, "a CPU has none, idle ones or not"
    cuda_graphs.IDLE_STREAMS.discard(second)
    cuda_graphs.IDLE_STREAMS.add(first)  # as a runner does that is closed
    assert next_stream("cuda") is first, "the stream of a closed engine was idle"


def test_what_a_bench_launches_is_on_the_next_engines_stream(monkeypatch):
    """A second stream would make that engine's steps slower. On a CPU there is none, and none is left for an engine to take."""
    entered = []
    monkeypatch.setattr(cuda_graphs, "IDLE_STREAMS", idle := set())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered.append(stream) or nullcontext())
    with on_an_engines_stream(torch.device("cpu")):
        assert (entered, idle) == ([None], set())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    with on_an_engines_stream(torch.device("cuda")):
        assert next_stream("cuda") is entered[1], "the engine within has another stream than the bench"
