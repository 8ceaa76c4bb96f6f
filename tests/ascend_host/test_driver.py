"""torch_npu itself on the stand-in driver."""

from __future__ import annotations

import pytest
import torch
import torch_npu
from stand_in import held_back, inject, slow_streams


def test_tensors_go_there_and_back():
    x = torch.arange(12.0).reshape(3, 4)
    assert torch.npu.is_available()
    assert torch.equal(x.to("npu").cpu(), x)


def test_fresh_memory_is_poisoned():
    fresh = torch.empty(40 << 20, dtype=torch.uint8, device="npu").cpu()
    assert (fresh == 0xFF).all()


def test_work_on_a_stream_is_late_and_an_event_waits_for_it():
    x = torch.full((1000,), 7.0).to("npu")
    copy = torch.zeros(1000).to("npu")
    first, second = torch.npu.Stream(), torch.npu.Stream()
    event = torch.npu.Event()
    torch.npu.synchronize()
    with held_back():
        with torch.npu.stream(first):
            copy.copy_(x, non_blocking=True)
            event.record()
        second.wait_event(event)
        assert not event.query()
    second.synchronize()
    assert event.query()
    assert torch.equal(copy.cpu(), torch.full((1000,), 7.0))


def test_a_stream_that_does_not_wait_is_too_early():
    x = torch.full((1000,), 7.0).to("npu")
    copy = torch.zeros(1000).to("npu")
    torch.npu.synchronize()
    first, second = torch.npu.Stream(), torch.npu.Stream()
    with slow_streams(50_000):
        with torch.npu.stream(first):
            copy.copy_(x, non_blocking=True)
        seen = torch.empty(1000, pin_memory=True)
        with torch.npu.stream(second):
            seen.copy_(copy, non_blocking=True)
        torch.npu.synchronize()
    # Both copies ran side by side: the simulated device does not order streams by itself.
    assert torch.equal(copy.cpu(), torch.full((1000,), 7.0))


def test_memory_that_runs_out_is_told():
    torch.npu.empty_cache()
    inject("malloc", times=100)  # the allocator tries again after freeing its cache
    with pytest.raises(RuntimeError, match="out of memory"):
        torch.empty(64 << 20, dtype=torch.uint8, device="npu")
    inject("malloc", times=0)
    assert torch.zeros(4).to("npu").cpu().sum() == 0


def test_a_matrix_can_be_cast_to_tiles_and_back():
    weight = torch.randn(48, 80).half()
    torch.npu.config.allow_internal_format = True
    try:
        tiled = torch_npu.npu_format_cast(weight.to("npu"), 29)
        assert torch_npu.get_npu_format(tiled) == 29
        assert torch.equal(torch_npu.npu_format_cast(tiled, 2).cpu(), weight)
    finally:
        torch.npu.config.allow_internal_format = False
