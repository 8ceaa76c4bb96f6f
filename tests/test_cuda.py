"""What only a CUDA device does: captured graphs, streams, faults found by kernels, the caller's own capture.

That its numbers are right is tested with every other device: test_operations.py, test_parity.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import DEVICES, Runner, Shape, random_model, relative_error

from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM
from modeltorch.sampling import Sampler, Sampling, SamplingRows
from modeltorch.shapes import Qwen2Shape

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_layers_of_few_rows_in_one_launch_equal_the_cpu(dtype):
    model = random_model(SHAPE)
    gpu, cpu = (Runner(SHAPE, model, dtype, device) for device in ("cuda", "cpu"))
    for runner in (gpu, cpu):
        runner.prefill([[1, 2, 3], [4], [5, 6, 7, 8, 9], [10] * 17, [11, 12], [13] * 40, [14, 15], [16] * 9])
    for step in range(16):
        chosen = {n: 20 + step + n for n in range(8) if n <= step % 8}
        assert relative_error(gpu.decode(chosen).cpu(), cpu.decode(chosen)) < 2e-2
    seen = counters(gpu)
    assert seen["captures"] >= 4  # of 1, 2, 4 and 8 rows
    assert seen["captures"] + seen["replays"] == 16
    if torch.cuda.get_device_capability() == (9, 0):
        assert seen["joined_layers"] == SHAPE.layers


def test_layers_in_one_launch_share_out_a_context_that_grows():
    shape = replace(SHAPE, max_positions=1024)
    model = random_model(shape)
    gpu, cpu = (Runner(shape, model, torch.bfloat16, device, blocks=96) for device in ("cuda", "cpu"))
    for runner in (gpu, cpu):
        runner.prefill([[n % 50 for n in range(length)] for length in (120, 700, 1)])
    streams = [torch.cuda.Stream() for _ in range(2)]
    for step in range(12):
        chosen = {step % 3: 5 + step}
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[step % 2]):
            logits = gpu.decode(chosen)
        torch.cuda.synchronize()
        assert relative_error(logits.cpu(), cpu.decode(chosen)) < 2e-2


def test_outputs_of_the_caller_are_written_with_and_without_padding():
    gpu, cpu = prefilled()
    for chosen in ({0: 3}, {0: 4, 1: 5}, {0: 6, 1: 7, 2: 8}, {4: 1, 3: 2, 2: 3, 1: 4, 0: 5}):
        expected = cpu.decode(chosen)
        inputs, parameters = gpu.decode_inputs(chosen)
        out = torch.full((len(chosen) + 1, SHAPE.vocab), 7.0, device="cuda")
        gpu.decoder.execute_out(inputs, [out[:-1]], parameters)
        assert close(out[:-1], expected)
        assert (out[-1] == 7.0).all()


@pytest.mark.parametrize(
    ("dtype", "sequences"),
    [(torch.float32, 2), (torch.bfloat16, 2), (torch.bfloat16, 3), (torch.bfloat16, 16), (torch.bfloat16, 128)],
    ids=str,
)
def test_outputs_that_move_are_replayed_without_a_new_capture(dtype, sequences):
    shape = Shape(heads=4, kv_heads=2, head_size=64, hidden=256, intermediate=512, vocab=4096)
    gpu = Runner(shape, random_model(shape), dtype, "cuda", blocks=160)
    gpu.prefill([[n, n + 1] for n in range(sequences)])
    inputs, parameters = gpu.decode_inputs({n: n for n in range(sequences)})
    expected = gpu.decoder.execute(inputs, parameters)[0]
    assert torch.isfinite(expected).all()
    captures = counters(gpu)["captures"]
    outs = torch.zeros(3, sequences, shape.vocab, dtype=dtype, device="cuda")
    for step in range(9):
        outs.zero_()
        out = outs[step % 3]
        gpu.decoder.execute_out(inputs, [out], parameters)
        assert torch.equal(out, expected)
        assert (outs[(step + 1) % 3] == 0).all()
        assert torch.equal(gpu.decoder.execute(inputs, parameters)[0], expected)
    assert counters(gpu)["captures"] == captures
    assert counters(gpu)["replays"] == 18


def test_outputs_on_any_address_are_written():
    gpu, cpu = prefilled()
    memory = torch.zeros(2 * SHAPE.vocab + 2, device="cuda")
    for step in range(8):
        chosen = {0: step, 1: step + 1}
        inputs, parameters = gpu.decode_inputs(chosen)
        offset = step % 3 % 2
        memory.fill_(7.0)
        out = memory[offset : offset + 2 * SHAPE.vocab].view(2, -1)
        gpu.decoder.execute_out(inputs, [out], parameters)
        assert close(out, cpu.decode(chosen))
        assert (memory == 7.0).sum() == 2


def test_a_replay_under_way_keeps_its_own_inputs_and_outputs():
    gpu, cpu = prefilled()
    gpu.decode({0: 1, 1: 2})
    cpu.decode({0: 1, 1: 2})
    steps = [{0: 3 * n, 1: 50 - n} for n in range(6)]
    prepared = [gpu.decode_inputs(step) for step in steps]
    outs = [torch.zeros(2, SHAPE.vocab, device="cuda") for _ in steps]
    busy = torch.zeros(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    for _ in range(20):
        busy = busy @ busy
    for (inputs, parameters), out in zip(prepared, outs, strict=True):
        gpu.decoder.execute_out(inputs, [out], parameters)
    for step, out in zip(steps, outs, strict=True):
        assert close(out, cpu.decode(step))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_tables_that_are_not_whole_packs_are_gathered_too(dtype):
    shape = Shape(heads=2, kv_heads=1, head_size=6, hidden=20, intermediate=36)
    model = random_model(shape)
    gpu, cpu = Runner(shape, model, dtype, "cuda"), Runner(shape, model, dtype, "cpu")
    for runner in (gpu, cpu):
        runner.prefill([[1, 2, 3], [4]])
    for token in range(4):
        a, b = (runner.decode({0: token, 1: token + 1}) for runner in (gpu, cpu))
        assert relative_error(a, b) < (1e-4 if dtype == torch.float32 else 3e-2)


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


@contextmanager
def waiting_for_nothing() -> Iterator[None]:
    """Behind long work of the GPU: what is done inside neither asks torch to wait nor waits itself."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        busy = torch.zeros(4096, 4096, device="cuda")
        for _ in range(50):
            busy = busy @ busy
        done = torch.cuda.Event()
        done.record()
        yield
        assert not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_a_step_waits_for_nothing():
    gpu, _ = prefilled()
    gpu.decode({0: 1, 1: 2})
    steps = [gpu.decode_inputs({0: 1, 1: token}) for token in range(4)]
    with waiting_for_nothing():
        for inputs, parameters in steps:
            gpu.decoder.execute(inputs, parameters)


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


def drawn_rows(count: int, **options: float) -> SamplingRows:
    samplings = [Sampling(1.0 if row % 5 else 0.5, seed=row, **options) for row in range(count)]
    return SamplingRows(samplings, torch.device("cuda"), list(range(count)))


@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.8}], ids=str)
def test_a_row_draws_the_same_from_its_seed_whatever_stands_beside_it(options):
    logits = torch.randn(24, 5000, device="cuda") * 3
    sampler = Sampler()
    rows = drawn_rows(24, **options)
    together = [sampler.choose(logits, rows).tolist() for _ in range(5)]
    assert len({tuple(tokens) for tokens in together}) == 5
    for row in (0, 7, 23):
        alone = SamplingRows([Sampling(1.0 if row % 5 else 0.5, seed=row, **options)], logits.device, [row])
        tokens = [sampler.choose(logits[row : row + 1], alone).item() for _ in range(5)]
        assert tokens == [step[row] for step in together]
    on_host = SamplingRows(
        [Sampling(1.0 if row % 5 else 0.5, seed=row, **options) for row in range(24)],
        torch.device("cpu"),
        list(range(24)),
    )
    agreeing = [a == b for step in together for a, b in zip(step, sampler.choose(logits.cpu(), on_host), strict=True)]
    assert sum(agreeing) >= 0.98 * len(agreeing)  # sums in another order may come to the next token


@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.9}], ids=str)
def test_choosing_tokens_waits_for_nothing(options):
    logits = torch.randn(24, 5000, device="cuda")
    sampler = Sampler()
    sampler.choose(logits, drawn_rows(24, **options))
    with waiting_for_nothing():
        rows = drawn_rows(24, **options)
        for _ in range(4):
            sampler.choose(logits, rows)


def test_a_prefill_is_launched_before_the_one_in_front_has_ended(monkeypatch):
    import modeltorch.engine as engine_module

    shape = Qwen2Shape(64, 64, 128, 2, 1, 1, False, max_position_embeddings=128)
    model = FlashQwen2ForCausalLM(
        shape, shape.random_weights(torch.bfloat16, "cuda"), device="cuda", num_blocks=64, block_size=16
    )
    prompts = [[n + 1, n + 2, n + 3] for n in range(12)]
    expected = model.generate(prompts, max_new_tokens=5, ignore_eos=True)
    monkeypatch.setattr(engine_module, "MAX_PREFILL_TOKENS_CUDA", 10)
    engine = engine_module.Engine(model)
    launched, waited = [], []
    launch, wait = engine.prefill_step, engine_module.Download.wait
    monkeypatch.setattr(engine, "prefill_step", lambda requests: launched.append(len(waited)) or launch(requests))
    monkeypatch.setattr(engine_module.Download, "wait", lambda download: waited.append(0) or wait(download))
    requests = [engine_module.Request(prompt, 5, ignore_eos=True) for prompt in prompts]
    assert engine.run(requests) == expected
    assert launched == [0, 0, 1, 2]
