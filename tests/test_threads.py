"""Objects on several threads: independent ones do not meet, one is serialised, and Python goes on meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cache

import pytest
import torch
from reference import DEVICES, Runner, Shape, random_model

SHAPE = Shape()
STEPS = 200
every_device = pytest.mark.parametrize("device", DEVICES)


@cache
def reference_model(seed: int):
    return random_model(SHAPE, seed)


class Work:
    """A few different prefill and decode steps of one runner, and the logits that they give when run alone."""

    def __init__(self, seed: int, device: str = "cpu") -> None:
        runner = Runner(SHAPE, reference_model(seed), seed=seed, device=device)
        generator = torch.Generator().manual_seed(seed)
        self.runner = runner
        self.steps: list[tuple[torch.ScriptObject, list[torch.Tensor], str]] = []
        for lengths in ([3, 2], [17], [40, 1, 5]):
            prompts = [torch.randint(0, SHAPE.vocab, (n,), generator=generator).tolist() for n in lengths]
            self.steps.append((runner.encoder, *runner.prefill_inputs(prompts)))
        for made, inputs, text in self.steps:
            made.execute(inputs, text)
        for sequences in ([0, 1], [2], [5, 3, 4]):
            self.steps.append((runner.decoder, *runner.decode_inputs(dict.fromkeys(sequences, 7 + seed))))
        # The same tokens go to the same cache rows every time, so every round gives the same logits.
        self.expected = [made.execute(inputs, text)[0] for made, inputs, text in self.steps]

    def run(self, number: int) -> None:
        number %= len(self.steps)
        made, inputs, text = self.steps[number]
        assert torch.equal(made.execute(inputs, text)[0], self.expected[number])


def run_at_once(*bodies: Callable[[], None]) -> None:
    """Runs every body on a thread of its own, all started together; raises the first exception of any."""
    barrier = threading.Barrier(len(bodies))
    errors: list[BaseException] = []

    def guarded(body: Callable[[], None]) -> None:
        barrier.wait()
        try:
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


@every_device
def test_two_models_on_two_threads_give_what_they_give_alone(device):
    works = [Work(seed, device) for seed in (0, 1)]
    for first, second in zip(works[0].expected, works[1].expected, strict=True):
        assert not torch.equal(first, second)
    before = [work.runner.encoder.counters()["executions"] for work in works]

    def all_of(work: Work) -> Callable[[], None]:
        return lambda: [work.run(number) for number in range(STEPS)]

    run_at_once(*(all_of(work) for work in works))
    for work, executions in zip(works, before, strict=True):
        assert work.runner.encoder.counters()["executions"] - executions == STEPS // 2 + 1


@every_device
def test_two_threads_on_one_object_take_turns_and_both_are_right(device):
    work = Work(2, device)
    executions = work.runner.encoder.counters()["executions"]
    prefills = [number for number, (made, *_) in enumerate(work.steps) if made is work.runner.encoder]

    def all_of(order: list[int]) -> Callable[[], None]:
        return lambda: [work.run(order[number % len(order)]) for number in range(STEPS)]

    run_at_once(all_of(prefills), all_of(prefills[::-1]), all_of(prefills[1:]))
    assert work.runner.encoder.counters()["executions"] == executions + 3 * STEPS


@every_device
def test_reading_and_replacing_from_another_thread_does_not_disturb_a_run(device):
    work = Work(3, device)
    weights_before = work.runner.encoder.weight_spec()

    def look() -> None:
        for _ in range(STEPS):
            assert "memory plan" in work.runner.encoder.graph()
            assert work.runner.encoder.counters()["plans_built"] >= 1
            assert work.runner.encoder.weight_spec() == weights_before
            assert work.runner.encoder.progress() == 1.0
            work.runner.encoder.set_kv_cache(work.runner.caches[0::2], work.runner.caches[1::2])

    run_at_once(look, lambda: [work.run(number) for number in range(STEPS)])


def _spoilt(work: Work, number: int) -> None:
    made, inputs, text = work.steps[number % len(work.steps)]
    spoilt = list(inputs)
    # Only on a CPU does the call itself look at values.
    spoilt[0] = torch.full_like(spoilt[0], SHAPE.vocab) if spoilt[0].is_cpu else spoilt[0].double()
    with pytest.raises(ValueError, match="input_ids"):
        made.execute(spoilt, text)


@every_device
@pytest.mark.parametrize("shared", [False, True], ids=["two objects", "one object"])
def test_a_thread_that_gets_exceptions_does_not_disturb_the_other(shared, device):
    good = Work(4, device)
    bad = good if shared else Work(5, device)
    run_at_once(
        lambda: [_spoilt(bad, number) for number in range(STEPS)],
        lambda: [good.run(number) for number in range(STEPS)],
    )
    for number in range(len(bad.steps)):
        bad.run(number)


class Long:
    """A prefill that takes a good part of a second, however fast the machine is."""

    def __init__(self) -> None:
        shape = Shape(heads=8, kv_heads=8, head_size=64, hidden=512, intermediate=1024, layers=2, max_positions=20_000)
        model = random_model(shape)
        for length in (1500, 3000, 6000, 12_000):
            runner = Runner(shape, model, block_size=128, blocks=128)
            self.made = runner.encoder
            self.step = runner.prefill_inputs([[n % shape.vocab for n in range(length)]], indices=[0])
            self.run()  # plans
            self.run()
            if self.ended - self.started > 0.2:
                break

    def run(self) -> None:
        self.started = time.perf_counter()
        self.made.execute(*self.step)
        self.ended = time.perf_counter()


@pytest.fixture(scope="module")
def long_prefill() -> Long:
    return Long()


def test_execute_lets_other_python_threads_run(long_prefill):
    thread = threading.Thread(target=long_prefill.run)
    thread.start()
    ticks = []
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    thread.join()
    took = long_prefill.ended - long_prefill.started
    assert took > 0.05, "the step is too short to tell anything"
    # A thread that held the interpreter would let nobody tick between its first and its last moment.
    middle = [tick for tick in ticks if long_prefill.started + 0.1 * took < tick < long_prefill.ended - 0.1 * took]
    assert len(middle) >= 5


def _begin(long_prefill: Long) -> threading.Thread:
    """Starts the long prefill on a thread and waits until it is under way."""
    long_prefill.started = 0.0
    thread = threading.Thread(target=long_prefill.run)
    thread.start()
    while not long_prefill.started:
        time.sleep(0.001)
    time.sleep(0.02)
    return thread


def test_progress_does_not_wait_for_a_running_step_and_counters_do(long_prefill):
    executions = long_prefill.made.counters()["executions"]
    thread = _begin(long_prefill)
    assert long_prefill.made.progress() == 1.0
    asked = time.perf_counter()
    counted = long_prefill.made.counters()["executions"]
    thread.join()
    assert asked < long_prefill.ended, "progress must answer while the step runs"
    assert counted == executions + 1, "counters must wait for the step"


def test_a_step_of_one_object_does_not_wait_for_a_step_of_another(long_prefill):
    work = Work(6)
    thread = _begin(long_prefill)
    for number in range(len(work.steps)):
        work.run(number)
    done = time.perf_counter()
    thread.join()
    assert done < long_prefill.ended
