"""Faults of the driver and of the vendor's operations: each comes back once, says where it was, and leaves the object
as it was."""

from __future__ import annotations

import re
import subprocess
import sys
import threading

import pytest
import torch
from reference import Runner, Shape, random_model
from stand_in import BLOCKING, IN_LINE, MODE, count, held_calls, inject, pending


@pytest.fixture
def runner() -> Runner:
    """A model that has answered [1, 2, 3] and one more token, so that its plans are made."""
    made = Runner(Shape(), random_model(Shape()), torch.float16, "npu")
    made.prefill([[1, 2, 3]])
    made.decode({0: 4})
    return made


@pytest.fixture(autouse=True)
def no_fault_is_left():
    yield
    for fault in ("malloc", "setup", "execute", "kernel", "event_record", "event_wait", "event_timeout"):
        left = pending(fault)
        inject(fault, times=0)
        assert left == 0, f"the fault {fault} did not happen"


def step_of(runner: Runner) -> tuple[list[torch.Tensor], str]:
    """Inputs that may run again and again: the same token is written each time."""
    return runner.prefill_inputs([[1, 2, 3]])


def fails_in_the_call(runner: Runner, step, *patterns: str) -> None:
    with pytest.raises(RuntimeError) as failure:
        runner.encoder.execute(*step)
    for pattern in patterns:
        assert re.search(pattern, str(failure.value)), str(failure.value)


def fails_at_the_next_call(runner: Runner, step, *patterns: str) -> None:
    runner.encoder.execute(*step)
    fails_in_the_call(runner, step, "an earlier step of this object failed after its call had returned", *patterns)


def works(runner: Runner, step, expected: torch.Tensor) -> None:
    for _ in range(2):
        assert torch.equal(runner.encoder.execute(*step)[0].cpu(), expected)


@pytest.mark.parametrize("node", [0, 7, 20])
def test_a_failed_setup_names_the_node(runner, node):
    step = step_of(runner)
    expected = runner.encoder.execute(*step)[0].cpu()
    inject("setup", skip=node)
    fails = fails_in_the_call if IN_LINE or MODE == "1" else fails_at_the_next_call
    fails(
        runner,
        step,
        r"qwen_PAModel\.execute \[DecoderModel_Prefill\]",
        r"node [\w.]+ \(\w+\): \w+Operation: the vendor's Setup returned 1 for \(.*\) -> \(.*\): .*told to fail here",
    )
    works(runner, step, expected)


@pytest.mark.parametrize("node", [0, 9, 25])
def test_a_failed_launch_names_the_node(runner, node):
    step = step_of(runner)
    expected = runner.encoder.execute(*step)[0].cpu()
    inject("execute", skip=node)
    fails = fails_in_the_call if IN_LINE else fails_at_the_next_call
    fails(runner, step, r"node [\w.]+ \(\w+\): \w+Operation: the vendor's Execute returned 7 for \(.*told to fail here")
    works(runner, step, expected)


def test_a_failed_launch_names_model_and_layer(runner):
    inject("execute", skip=12)
    fails = fails_in_the_call if IN_LINE else fails_at_the_next_call
    fails(runner, step_of(runner), r"DecoderModel_Prefill", r"node layers\.0\.\w+")


@pytest.mark.skipif(IN_LINE, reason="launches are in line in this mode")
@pytest.mark.parametrize("method", ["execute_out", "set_kv_cache", "set_weight", "set_param", "settle"])
def test_a_queued_failure_comes_at_the_next_call_whatever_it_is(runner, method):
    step = step_of(runner)
    inject("execute", skip=3)
    runner.encoder.execute(*step)
    out = torch.zeros(3, Shape().vocab, dtype=torch.float16).to("npu")
    calls = {
        "execute_out": lambda: runner.encoder.execute_out(step[0], [out], step[1]),
        "set_kv_cache": lambda: runner.encoder.set_kv_cache(runner.caches[0::2], runner.caches[1::2]),
        "set_weight": lambda: runner.encoder.set_weight([]),
        "set_param": lambda: runner.encoder.set_param("{}"),
        "settle": runner.encoder.settle,
    }
    with pytest.raises(RuntimeError, match="an earlier step of this object failed"):
        calls[method]()
    runner.encoder.execute(*step)


def test_settle_throws_once_after_the_logits_were_read(runner):
    step = step_of(runner)
    expected = runner.encoder.execute(*step)[0].cpu()
    assert runner.encoder.settle() == 0
    inject("execute", skip=3)
    if IN_LINE:
        fails_in_the_call(runner, step)
    else:
        runner.encoder.execute(*step)[0].cpu()
        with pytest.raises(RuntimeError, match=r"qwen_PAModel\.settle \[\w+\]: an earlier step.*Execute"):
            runner.encoder.settle()
    assert runner.encoder.settle() == 0
    works(runner, step, expected)


@pytest.mark.skipif(IN_LINE, reason="launches are in line in this mode")
def test_settle_waits_until_the_host_has_launched(runner):
    step = step_of(runner)
    torch.npu.synchronize()
    with held_calls("execute"):
        runner.encoder.execute(*step)
        thread = threading.Thread(target=runner.encoder.settle)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    thread.join()


@pytest.mark.skipif(IN_LINE, reason="launches are in line in this mode")
def test_a_queued_failure_is_of_one_object_alone(runner):
    other = Runner(Shape(), runner.model, torch.float16, "npu")
    step, other_step = step_of(runner), step_of(other)
    expected = other.encoder.execute(*other_step)[0].cpu()
    inject("execute", skip=3)
    runner.encoder.execute(*step)
    works(other, other_step, expected)
    fails_in_the_call(runner, step, "an earlier step of this object failed")
    works(runner, step, expected)


@pytest.mark.skipif(IN_LINE, reason="launches are in line in this mode")
def test_a_queued_failure_that_nobody_heard_is_a_warning(capfd):
    runner = Runner(Shape(), random_model(Shape()), torch.float16, "npu")
    step = step_of(runner)
    inject("execute", skip=3)
    runner.encoder.execute(*step)
    del runner
    assert "an object was destroyed before it could report: an earlier step" in capfd.readouterr().err


def test_a_kernel_that_fails_on_the_device_is_told(runner):
    step = step_of(runner)
    expected = runner.encoder.execute(*step)[0].cpu()
    inject("kernel", skip=5)
    if BLOCKING:
        fails_in_the_call(runner, step, r"node layers\.0\.\w+.*aclrtSynchronizeStream returned 507015")
    else:
        logits = runner.encoder.execute(*step)[0]
        with pytest.raises(RuntimeError, match="507015"):
            logits.cpu()
    works(runner, step, expected)


@pytest.mark.parametrize("fault", ["event_record", "event_wait"])
def test_a_stream_that_cannot_wait_is_told(runner, fault):
    step = step_of(runner)
    expected = runner.encoder.execute(*step)[0].cpu()
    call = {"event_record": "aclrtRecordEvent returned 507000", "event_wait": "aclrtStreamWaitEvent returned 107019"}
    with torch.npu.stream(torch.npu.Stream()):
        inject(fault)
        fails_in_the_call(runner, step, call[fault])
        works(runner, step, expected)


def test_a_wait_that_times_out_on_the_device_is_told(runner):
    step = step_of(runner)
    expected = runner.encoder.execute(*step)[0].cpu()
    with torch.npu.stream(torch.npu.Stream()):
        inject("event_timeout")
        if BLOCKING:
            fails_in_the_call(runner, step, "aclrtSynchronizeStream returned 507047")
        else:
            logits = runner.encoder.execute(*step)[0]
            with pytest.raises(RuntimeError, match="507047"):
                logits.cpu()
        works(runner, step, expected)


def test_memory_that_runs_out_is_told():
    """One allocation of a step after the other fails; each time the step works when there is memory again."""
    # Logits, arena and workspace are above the 10 MB from which the allocator asks the driver for each of them.
    shape = Shape(heads=1, kv_heads=1, layers=1, hidden=16, intermediate=24000, vocab=30000)
    model = random_model(shape)
    prompt = [list(range(200))]
    expected = Runner(shape, model, torch.float16, "npu").prefill(prompt)
    held = torch.npu.memory_reserved()
    torch.npu.empty_cache()
    if torch.npu.memory_reserved() == held:
        pytest.skip("torch_npu keeps its cache where its task queue is off")
    failures = []
    for skip in range(3):
        runner = Runner(shape, model, torch.float16, "npu")
        step = runner.prefill_inputs(prompt)
        torch.npu.empty_cache()
        inject("malloc", skip=skip, times=100)  # the allocator tries again after freeing its cache
        try:
            runner.encoder.execute(*step)
            torch.npu.synchronize()
            runner.encoder.execute(*step)  # reports what the first left
        except RuntimeError as error:
            failures.append(str(error))
        inject("malloc", times=0)
        works(runner, step, expected)
    assert any("NPU out of memory" in failure for failure in failures), failures
    assert any("no device memory for a workspace" in failure for failure in failures), failures


DEAD_QUEUE = """
import sys
import torch, torch_npu
sys.path[:0] = sys.argv[1:]
from reference import Runner, Shape, random_model
runner = Runner(Shape(), random_model(Shape()), torch.float16, "npu")
step = runner.prefill_inputs([[1, 2, 3]])
x = torch.ones(4).to("npu")
try:
    torch_npu.npu_format_cast(x, 3)  # an operator that the stand-in does not have: torch_npu's queue stops
    torch.npu.synchronize()
except RuntimeError:
    pass
for _ in range(4):
    try:
        runner.encoder.execute(*step)
    except RuntimeError as error:
        print("TOLD:", " ".join(str(error).split()))
print("END", flush=True)
"""


@pytest.mark.skipif(IN_LINE, reason="launches are in line in this mode")
def test_a_task_queue_that_has_stopped_is_told_by_every_call(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", DEAD_QUEUE, *sys.path],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,  # where no other modeltorch lies
        check=False,
    )
    assert "END" in ran.stdout, ran.stderr
    told = [line for line in ran.stdout.splitlines() if line.startswith("TOLD:")]
    assert len(told) == 4, ran.stdout
    assert all("qwen_PAModel.execute [DecoderModel_Prefill]: torch_npu's task queue" in line for line in told), told


def test_every_rule_was_kept():
    assert count("dead_memory") == 0
