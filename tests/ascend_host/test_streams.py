"""Steps of the Qwen2 model on the streams of device npu: what waits for what, and what is kept until it has run."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from pairs import Pair
from reference import Layout, Runner, Shape, random_model
from stand_in import BLOCKING, IN_LINE, MODE, count, held_back, held_calls, slow_streams


def test_the_current_stream_is_used_at_every_step():
    """Each step on another stream: the next one must see the cache that the last one wrote, and its own arena."""
    pair = Pair(Shape(), torch.float16)
    streams = [torch.npu.Stream() for _ in range(3)]
    pair.prefill([[1, 2, 3], [4, 5]])
    torch.npu.synchronize()
    waits = count("event_waits")
    with slow_streams(200):
        logits = []
        for step in range(6):
            inputs, parameters = pair.npu.decode_inputs({0: step, 1: step + 1})
            torch.npu.synchronize()  # the inputs came on the default stream; the steps must not need this
            with torch.npu.stream(streams[step % 3]):
                logits.append(pair.npu.decoder.execute(inputs, parameters)[0])
        torch.npu.synchronize()
    for step in range(6):
        pair.same(logits[step].cpu(), pair.cpu.decode({0: step, 1: step + 1}))
    assert count("event_waits") - waits >= 5


@pytest.mark.skipif(BLOCKING, reason="every node is waited for in this mode")
def test_steps_on_changing_streams_wait_for_each_other():
    """The first stream has much to do before its step: the step on the second must not overtake it."""
    pair = Pair(Shape(), torch.float16)
    pair.prefill([[1, 2, 3], [4, 5]])
    pair.decode({0: 9, 1: 9})
    steps = [pair.npu.decode_inputs({0: step, 1: step + 1}) for step in range(2)]
    busy, other = torch.npu.Stream(), torch.npu.Stream()
    much = [torch.zeros(4 << 20).to("npu") for _ in range(2)]
    torch.npu.synchronize()
    logits = []
    with torch.npu.stream(busy):
        for _ in range(40):
            much[0].copy_(much[1], non_blocking=True)
        logits.append(pair.npu.decoder.execute(*steps[0])[0])
        assert not busy.query()
    with torch.npu.stream(other):
        logits.append(pair.npu.decoder.execute(*steps[1])[0])
    torch.npu.synchronize()
    for step in range(2):
        pair.same(logits[step].cpu(), pair.cpu.decode({0: step, 1: step + 1}))


@pytest.mark.skipif(BLOCKING, reason="every node is waited for in this mode")
def test_memory_that_was_outgrown_is_kept_while_another_stream_uses_it():
    """Made on the first stream, still in use on the second when a larger step on the third lets it go."""
    shape = Shape(layers=1, vocab=300, intermediate=12000)
    runner = Runner(shape, random_model(shape), torch.float16, "npu")
    small, large = runner.prefill_inputs([[1] * 60]), runner.prefill_inputs([[2] * 200])
    first, second, third = (torch.npu.Stream() for _ in range(3))
    torch.npu.synchronize()
    with torch.npu.stream(first):
        expected = runner.encoder.execute(*small)[0].cpu()
    ones = torch.ones(1 << 18, pin_memory=True)
    with slow_streams(10_000):
        with torch.npu.stream(second):
            logits = runner.encoder.execute(*small)[0]
        with torch.npu.stream(third):
            runner.encoder.execute(*large)
        with torch.npu.stream(first):
            others = [torch.empty(1 << 18, device="npu").copy_(ones, non_blocking=True) for _ in range(24)]
        torch.npu.synchronize()
    assert torch.equal(logits.cpu(), expected)
    assert all((other.cpu() == 1).all() for other in others)


def test_two_models_run_on_two_streams():
    """Two threads, two models, two streams: neither sees the other."""
    pairs = [Pair(Shape(), torch.float16, Layout(), 16, 64, seed) for seed in (1, 2)]
    failures: list[BaseException] = []

    def answer(pair: Pair, stream: torch.npu.Stream) -> None:
        try:
            with torch.npu.stream(stream):
                pair.prefill([[1, 2, 3], [4, 5]])
                for step in range(8):
                    pair.decode({0: step, 1: step + 1})
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=answer, args=(pair, torch.npu.Stream())) for pair in pairs]
    with slow_streams(50):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


@pytest.mark.skipif(BLOCKING, reason="every node is waited for in this mode")
def test_inputs_may_go_away_while_launches_are_under_way():
    """The caller drops its tensors and the allocator gives their memory to others before the device begins."""
    pair = Pair(Shape(), torch.float16)
    pair.prefill([[1, 2, 3]])
    pair.decode({0: 4})
    torch.npu.synchronize()
    inputs, parameters = pair.npu.decode_inputs({0: 5})
    torch.npu.synchronize()
    with held_back():
        logits = pair.npu.decoder.execute(inputs, parameters)[0]
        inputs.clear()
        others = [torch.full((8,), 77, dtype=torch.int64, pin_memory=True) for _ in range(4)]
        others = [other.to("npu", non_blocking=True) for other in others]
    torch.npu.synchronize()
    pair.same(logits.cpu(), pair.cpu.decode({0: 5}))


@pytest.mark.skipif(BLOCKING, reason="every node is waited for in this mode")
def test_execute_returns_before_the_device_has_begun():
    runner = Runner(Shape(), random_model(Shape()), torch.float16, "npu")
    runner.prefill([[1, 2, 3]])
    runner.decode({0: 4})
    inputs, parameters = runner.decode_inputs({0: 5})
    torch.npu.synchronize()
    with held_back():
        logits = runner.decoder.execute(inputs, parameters)[0]
        done = torch.npu.Event()
        done.record()
        assert not done.query()
    torch.npu.synchronize()
    assert torch.isfinite(logits.cpu()).all()


@pytest.mark.skipif(IN_LINE, reason="launches are in line in this mode")
def test_execute_returns_before_the_host_has_launched():
    """What a launch reads must survive the call: the inputs, the lengths that the parameters held, the arena."""
    pair = Pair(Shape(), torch.float16)
    pair.prefill([[1, 2, 3], [4, 5]])
    pair.decode({0: 4, 1: 5})
    inputs, parameters = pair.npu.decode_inputs({0: 5, 1: 6})
    torch.npu.synchronize()
    before = count("operations")
    with held_calls("execute", *(["setup"] if MODE == "2" else [])):
        logits = pair.npu.decoder.execute(inputs, parameters)[0]
        assert count("operations") == before
        inputs.clear()
        del parameters
        churn = [bytes(range(n)) for n in range(256)]  # the memory of what was freed is written again
    del churn
    pair.same(logits.cpu(), pair.cpu.decode({0: 5, 1: 6}))


@pytest.mark.skipif(IN_LINE, reason="launches are in line in this mode")
def test_the_next_call_waits_for_launches_under_way():
    pair = Pair(Shape(), torch.float16)
    pair.prefill([[1, 2, 3], [4, 5]])
    steps = [pair.npu.decode_inputs({0: step, 1: step}) for step in range(2)]
    logits = []

    def run() -> None:
        logits.extend(pair.npu.decoder.execute(*step)[0] for step in steps)

    before = count("operations")
    with held_calls("execute"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert count("operations") == before
    thread.join()
    for step in range(2):
        pair.same(logits[step].cpu(), pair.cpu.decode({0: step, 1: step}))


def test_objects_can_be_destroyed_while_launches_are_under_way():
    contexts = count("contexts")
    for _ in range(3):
        runner = Runner(Shape(), random_model(Shape()), torch.float16, "npu")
        inputs, parameters = runner.prefill_inputs([[1, 2, 3]])
        with slow_streams(100):
            logits = runner.encoder.execute(inputs, parameters)[0]
            del runner
        torch.npu.synchronize()
        assert torch.isfinite(logits.cpu()).all()
    assert count("contexts") == contexts


def test_copies_of_parameters_replace_a_model_with_work_under_way():
    runner = Runner(Shape(), random_model(Shape()), torch.float16, "npu")
    other = Runner(Shape(), copy.deepcopy(runner.model), torch.float16, "npu")
    inputs, parameters = runner.prefill_inputs([[1, 2, 3]])
    expected = other.prefill([[1, 2, 3]])
    with slow_streams(100):
        logits = runner.encoder.execute(inputs, parameters)[0]
        runner.encoder.set_kv_cache(other.caches[0::2], other.caches[1::2])
        again = runner.encoder.execute(inputs, parameters)[0]
    assert torch.equal(logits.cpu(), expected)
    assert torch.equal(again.cpu(), expected)
