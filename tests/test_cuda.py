"""What only a CUDA device does: captured graphs, streams, faults found by kernels, the caller's own capture.

That its numbers are right is tested with every other device: test_operations.py, test_parity.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from reference import DEVICES, Runner, Shape, random_model, relative_error

pytestmark = pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU, or a library without CUDA")

SHAPE = Shape(heads=4, kv_heads=2, head_size=64, hidden=128, intermediate=192)
DTYPE = torch.float32


def pair(**options) -> tuple[Runner, Runner]:
    """The same model on the GPU and on the CPU."""
    model = random_model(SHAPE)
    return Runner(SHAPE, model, DTYPE, "cuda", **options), Runner(SHAPE, model, DTYPE, "cpu", **options)


def prefilled(**options) -> tuple[Runner, Runner]:
    """Both with the same five sequences."""
    runners = pair(**options)
    for runner in runners:
        runner.prefill([[1, 2, 3], [4], [5, 6, 7, 8, 9], [10] * 17, [11, 12]])
    return runners


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return relative_error(a.cpu(), b.cpu()) < 1e-4


def counters(runner: Runner) -> dict[str, int]:
    return dict(runner.decoder.counters())


def test_replayed_steps_equal_the_cpu_for_any_batch_of_a_bucket():
    gpu, cpu = prefilled()
    for step in range(24):
        chosen = {n: 20 + step + n for n in range(5) if (step + n) % 3 or n == 0}
        assert close(gpu.decode(chosen), cpu.decode(chosen))
    seen = counters(gpu)
    assert seen["captures"] >= 1
    assert seen["replays"] >= 12
    assert seen["captured_bytes"] > 0
    assert seen["captured_graphs"] <= seen["plans"]


def test_outputs_of_the_caller_are_written_with_and_without_padding():
    gpu, cpu = prefilled()
    for chosen in ({0: 3}, {0: 4, 1: 5}, {0: 6, 1: 7, 2: 8}, {4: 1, 3: 2, 2: 3, 1: 4, 0: 5}):
        expected = cpu.decode(chosen)
        inputs, parameters = gpu.decode_inputs(chosen)
        out = torch.full((len(chosen) + 1, SHAPE.vocab), 7.0, device="cuda")
        gpu.decoder.execute_out(inputs, [out[:-1]], parameters)
        assert close(out[:-1], expected)
        assert (out[-1] == 7.0).all()


def test_other_tables_and_caches_are_captured_anew():
    gpu, cpu = prefilled()
    for token in range(3):
        gpu.decode({0: token})
        cpu.decode({0: token})
    before = counters(gpu)["captures"]
    gpu.cos, gpu.sin = gpu.cos.clone(), gpu.sin.clone()
    assert close(gpu.decode({0: 9}), cpu.decode({0: 9}))
    assert counters(gpu)["captures"] == before + 1
    gpu.caches = [cache.clone() for cache in gpu.caches]
    gpu.decoder.set_kv_cache(gpu.caches[0::2], gpu.caches[1::2])
    assert close(gpu.decode({0: 10}), cpu.decode({0: 10}))
    assert counters(gpu)["captures"] == before + 2


def test_a_wider_block_table_is_captured_anew():
    gpu, cpu = prefilled(block_size=1, blocks=300)
    for token in range(40):
        assert close(gpu.decode({0: token}), cpu.decode({0: token}))
    assert counters(gpu)["captures"] < 10


def test_steps_on_changing_streams_come_in_order():
    gpu, cpu = prefilled()
    streams = [torch.cuda.Stream() for _ in range(3)]
    for step in range(9):
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[step % 3]):
            logits = gpu.decode({n: step + n for n in range(3)})
        assert close(logits, cpu.decode({n: step + n for n in range(3)}))


def test_a_step_waits_for_nothing():
    gpu, _ = prefilled()
    gpu.decode({0: 1, 1: 2})
    steps = [gpu.decode_inputs({0: 1, 1: token}) for token in range(4)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        busy = torch.zeros(4096, 4096, device="cuda")
        for _ in range(50):
            busy = busy @ busy
        done = torch.cuda.Event()
        done.record()
        for inputs, parameters in steps:
            gpu.decoder.execute(inputs, parameters)
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_the_callers_own_capture_records_a_step():
    gpu, cpu = prefilled()
    chosen = {0: 5, 1: 6, 2: 7}
    expected = cpu.decode(chosen)
    inputs, parameters = gpu.decode_inputs(chosen)
    out = torch.zeros(3, SHAPE.vocab, device="cuda")
    gpu.decoder.execute_out(inputs, [out], parameters)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu.decoder.execute_out(inputs, [out], parameters)
    out.zero_()
    graph.replay()
    assert close(out, expected)
    inputs[0].copy_(torch.tensor([9, 8, 7]))  # a replay reads the caller's tensors as they are then
    graph.replay()
    replayed = out.clone()
    gpu.decoder.execute_out(inputs, [out], parameters)
    assert close(replayed, out)
    assert not close(replayed, expected)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("position", "value", "words"),
    [(0, 10**12, "row index"), (0, -1, "row index"), (1, 512, "row index"), (6, 10**6, "slot"), (6, -2, "slot")],
)
def test_a_bad_index_touches_nothing_and_is_told_once_by_the_next_call(phase, position, value, words):
    gpu, cpu = prefilled()
    if phase == "prefill":
        step = gpu.encoder
        inputs, parameters = gpu.prefill_inputs([[1, 2, 3]])
    else:
        step = gpu.decoder
        inputs, parameters = gpu.decode_inputs({0: 1, 1: 2, 2: 3})
    good = inputs[position].clone()
    inputs[position][1] = value
    step.execute(inputs, parameters)
    torch.cuda.synchronize()
    inputs[position].copy_(good)
    with pytest.raises(ValueError, match=words):
        step.execute(inputs, parameters)
    logits = step.execute(inputs, parameters)[0]
    assert torch.isfinite(logits).all()
    if phase == "decode":
        assert close(logits, cpu.decode({0: 1, 1: 2, 2: 3}))


def test_a_block_outside_the_cache_is_told():
    gpu, cpu = prefilled()
    inputs, parameters = gpu.decode_inputs({3: 1})
    inputs[5][0, 0] = 64
    gpu.decoder.execute(inputs, parameters)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="block"):
        gpu.decoder.execute(inputs, parameters)
    torch.cuda.synchronize()
    assert close(gpu.decode({0: 2}), cpu.decode({0: 2}))


SPOILT_STEPS = """
import sys
from test_cuda import prefilled
gpu, _ = prefilled()
inputs, parameters = gpu.decode_inputs({0: 1})
for position, value in ((0, 10**12), (6, 10**6), (5, 64), (0, 1)):
    good = inputs[position].clone()
    inputs[position].view(-1)[0] = value
    try:
        gpu.decoder.execute(inputs, parameters)
        print("no error")
    except ValueError as error:
        print(str(error).splitlines()[0])
    inputs[position].copy_(good)
"""


def test_the_debug_switch_names_the_node_of_a_bad_index_at_once():
    run = subprocess.run(
        [sys.executable, "-c", SPOILT_STEPS],
        env={**os.environ, "MODELTORCH_BLOCKING": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    ids, slots, blocks, good = run.stdout.splitlines()
    assert re.search(r"node \S*embed\S* \(GatherRows\): .*row index", ids)
    assert re.search(r"node layers\.0\.attn\S* \(RopeAttention\): .*slot", slots)
    assert re.search(r"node layers\.0\.attn\S* \(RopeAttention\): .*block", blocks)
    assert good == "no error"


@pytest.mark.parametrize(
    ("sizes", "indices"), [({"intermediate": 16384}, [0]), ({"vocab": 60_000}, None)], ids=["arena", "outputs"]
)
def test_memory_that_runs_out_is_one_exception_and_the_object_works_on(sizes, indices):
    shape = Shape(heads=4, kv_heads=2, head_size=64, hidden=128, **{"intermediate": 192, **sizes})
    model = random_model(shape)
    gpu, cpu = Runner(shape, model, DTYPE, "cuda"), Runner(shape, model, DTYPE, "cpu")
    assert close(gpu.prefill([[1, 2, 3]]), cpu.prefill([[1, 2, 3]]))
    assert close(gpu.decode({0: 4}), cpu.decode({0: 4}))
    prompt = [n % 97 for n in range(400)]
    step = gpu.prefill_inputs([prompt], indices)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**22) / total)
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="memory"):
                gpu.encoder.execute(*step)
        assert close(gpu.decode({0: 5}), cpu.decode({0: 5}))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert close(gpu.encoder.execute(*step)[0], cpu.prefill([prompt], indices))


def test_captured_graphs_are_bounded_and_reported():
    gpu, _ = prefilled()
    batches = [2**power for power in range(7)] + [64 * n for n in range(2, 65)]  # each a bucket of its own
    for batch in batches:
        inputs = gpu.inputs(
            [0] * batch,
            [0] * batch,
            [-1] * batch,
            torch.zeros(batch, 1, dtype=torch.int32),
            [1] * batch,
            torch.zeros(1),
        )
        gpu.decoder.execute(inputs, json.dumps({"seqLen": [1] * batch}))
    seen = counters(gpu)
    assert seen["captures"] == len(batches)
    assert seen["captured_graphs"] == seen["plans"] == 64
    assert seen["plans_evicted"] == len(batches) - 64
    assert seen["captured_bytes"] > 0


def test_two_objects_on_two_threads_do_not_meet():
    def work(seed: int) -> bool:
        model = random_model(SHAPE, seed)
        gpu, cpu = Runner(SHAPE, model, DTYPE, "cuda"), Runner(SHAPE, model, DTYPE, "cpu")
        with torch.cuda.stream(torch.cuda.Stream()):
            for runner in (gpu, cpu):
                runner.prefill([[seed, 2, 3]])
            return all(close(gpu.decode({0: token}), cpu.decode({0: token})) for token in range(12))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
