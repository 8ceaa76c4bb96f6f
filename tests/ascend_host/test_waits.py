"""What steps and objects wait for: the task queue, the stream that still needs an event, memory of another stream."""

from __future__ import annotations

import threading

import pytest
import torch
import torch_npu
from reference import Runner, Shape, random_model
from stand_in import BLOCKING, HAS_QUEUE, IN_LINE, count, held_calls, slow_streams


@pytest.mark.skipif(not (HAS_QUEUE and IN_LINE), reason="of the mode that drains torch_npu's task queue")
def test_a_step_in_line_waits_until_the_task_queue_is_empty():
    """What the caller has put on the queue, here the cast that makes an input, must be launched before the step."""
    runner = Runner(Shape(), random_model(Shape()), torch.float16, "npu")
    inputs, parameters = runner.prefill_inputs([[1, 2, 3]])
    expected = runner.encoder.execute(inputs, parameters)[0].cpu()
    torch.npu.config.allow_internal_format = True
    tiled = torch_npu.npu_format_cast(inputs[2], 29)
    torch.npu.config.allow_internal_format = False
    torch.npu.synchronize()
    before = count("operations")
    logits = []
    with held_calls("cast"):
        inputs[2] = torch_npu.npu_format_cast(tiled, 2)
        thread = threading.Thread(target=lambda: logits.extend(runner.encoder.execute(inputs, parameters)))
        thread.start()
        thread.join(0.3)
        waits, launched = thread.is_alive(), count("operations") - before
    thread.join()
    assert waits
    assert launched == 0
    assert torch.equal(logits[0].cpu(), expected)


@pytest.mark.skipif(BLOCKING, reason="every node is waited for in this mode")
def test_an_object_that_goes_away_waits_for_the_stream_that_still_needs_its_event():
    runner = Runner(Shape(), random_model(Shape()), torch.float16, "npu")
    step = runner.prefill_inputs([[1, 2, 3]])
    expected = runner.encoder.execute(*step)[0].cpu()
    other = torch.npu.Stream()
    torch.npu.synchronize()
    early = count("events_destroyed_early")
    with slow_streams(2_000):
        runner.encoder.execute(*step)
        with torch.npu.stream(other):
            logits = runner.encoder.execute(*step)[0]
        del runner
        assert count("events_destroyed_early") == early
        torch.npu.synchronize()
    assert torch.equal(logits.cpu(), expected)


@pytest.mark.skipif(BLOCKING, reason="every node is waited for in this mode")
def test_a_workspace_is_not_taken_along_to_another_stream():
    """It belongs to the stream that it was allocated for: given back there, it may be written by what comes next."""
    shape = Shape(layers=1, vocab=300, intermediate=12000)
    runner = Runner(shape, random_model(shape), torch.float16, "npu")
    step, larger = runner.prefill_inputs([[1] * 60]), runner.prefill_inputs([[2] * 200])
    first, second = torch.npu.Stream(), torch.npu.Stream()
    torch.npu.synchronize()
    with torch.npu.stream(first):
        expected = runner.encoder.execute(*step)[0].cpu()
    ones = torch.ones(1 << 18, pin_memory=True)
    with slow_streams(10_000):
        with torch.npu.stream(second):
            logits = runner.encoder.execute(*step)[0]
            runner.encoder.execute(*larger)
            assert runner.encoder.settle() == 0  # what the first step used may go
        with torch.npu.stream(first):
            others = [torch.empty(1 << 18, device="npu").copy_(ones, non_blocking=True) for _ in range(24)]
        torch.npu.synchronize()
    assert torch.equal(logits.cpu(), expected)
    assert all((other.cpu() == 1).all() for other in others)
