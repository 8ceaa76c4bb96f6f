"""The Qwen2 model on device npu: against transformers and against the CPU, in every configuration of test_parity.py."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch_npu
from hypothesis import given
from hypothesis import strategies as st
from reference import Layout, Runner, Shape, random_model, relative_error
from stand_in import BLOCKING, IN_LINE, IS_OLD_CHIP, MODE, count, held_back, held_calls, slow_streams
from test_parity import Comparison, layouts, lengths, random_tokens, shapes

HALVES = [torch.float16, torch.bfloat16]

CPU_TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Both sides round every intermediate to the same type; only the order of float32 sums differs, which now and then
turns the last bit of one."""


def tiled(shape: Shape) -> Shape:
    """The shape with head counts whose caches can be cut into tiles, on chips that want them so."""
    return shape if not IS_OLD_CHIP or shape.kv_heads * shape.head_size % 16 == 0 else Shape()


class Pair:
    """The same model, cache layout and prompts on the NPU and on the CPU."""

    def __init__(self, shape: Shape, dtype: torch.dtype, *arguments) -> None:
        model = random_model(shape, arguments[-1] if arguments else 0)
        self.npu, self.cpu = (Runner(shape, model, dtype, device, *arguments) for device in ("npu", "cpu"))

    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        return self.same(self.npu.prefill(prompts), self.cpu.prefill(prompts))

    def decode(self, new_tokens: dict[int, int]) -> torch.Tensor:
        return self.same(self.npu.decode(new_tokens), self.cpu.decode(new_tokens))

    def same(self, npu: torch.Tensor, cpu: torch.Tensor) -> torch.Tensor:
        assert relative_error(npu, cpu) < CPU_TOLERANCE[npu.dtype]
        return npu


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@given(
    shape=shapes(),
    layout=layouts(),
    prompt_lengths=lengths(),
    block_size=st.sampled_from([1, 16, 128]),
    seed=st.integers(0, 99),
)
def test_prefill_and_decode_equal_transformers_and_the_cpu(dtype, shape, layout, prompt_lengths, block_size, seed):
    shape = tiled(shape)
    generator = torch.Generator().manual_seed(seed)
    blocks = sum(-(-(length + 4) // block_size) for length in prompt_lengths) + 3
    pair = Pair(shape, dtype, layout, block_size, blocks, seed)
    comparison = Comparison(pair.npu)
    logits = pair.prefill([random_tokens(length, shape.vocab, generator) for length in prompt_lengths])
    comparison.add(logits, pair.npu.tokens, last_only=False)
    for _ in range(3):
        order = torch.randperm(len(prompt_lengths), generator=generator).tolist()
        chosen = order[: max(1, len(order) - 1)]
        new = {sequence: random_tokens(1, shape.vocab, generator)[0] for sequence in chosen}
        comparison.add(pair.decode(new), [pair.npu.tokens[sequence] for sequence in chosen], last_only=True)
    comparison.check_half_precision()


def test_logits_rows_come_in_the_order_that_was_asked_for():
    runner = Runner(Shape(), random_model(Shape()), torch.float16, "npu")
    prompts = [[1, 2, 3, 4], [5, 6], [7]]
    every = runner.prefill(prompts)
    asked = [6, 0, 0, 5, 3]
    torch.testing.assert_close(runner.prefill(prompts, asked), every[asked], rtol=2e-2, atol=2e-2)
    assert runner.prefill(prompts, []).shape == (0, Shape().vocab)


def test_a_long_sequence_among_short_ones():
    shape = Shape(heads=7, kv_heads=1, head_size=64, hidden=96)
    pair = Pair(shape, torch.float16, Layout(), 16, 80)
    generator = torch.Generator().manual_seed(3)
    pair.prefill([random_tokens(length, shape.vocab, generator) for length in (1, 300, 2, 129)])
    pair.decode({n: n + 1 for n in range(4)})


def test_a_step_may_need_more_workspace_than_the_first_of_its_plan():
    """40 tokens and 60 share a plan; the stand-in asks for workspaces in proportion to the rows."""
    shape = Shape(vocab=3000, intermediate=2000)
    pair = Pair(shape, torch.float16)
    generator = torch.Generator().manual_seed(1)
    for length in (34, 60, 50, 64):
        pair.prefill([random_tokens(length, shape.vocab, generator)])
    assert dict(pair.npu.encoder.counters())["plans_built"] == 1


def test_no_tokens_give_no_rows_and_launch_nothing():
    runner = Runner(Shape(), random_model(Shape()), torch.float16, "npu")
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = runner.inputs([], [], [], torch.zeros(0, 1, dtype=torch.int32), [], nothing)
    before = count("operations")
    for step_object in (runner.encoder, runner.decoder):
        assert step_object.execute(empty, '{"seqLen": []}')[0].shape == (0, Shape().vocab)
    torch.npu.synchronize()
    assert count("operations") == before


def test_a_step_uses_these_vendor_operations():
    layers = 2
    runner = Runner(Shape(layers=layers), random_model(Shape(layers=layers)), torch.float16, "npu")
    packed = Runner(
        Shape(layers=layers), runner.model, torch.float16, "npu", Layout(qkv_packed=True, gate_up_packed=True)
    )
    packed.prefill([[1, 2, 3]])
    names = ("RmsNorm", "Linear", "Rope", "PagedAttention", "ReshapeAndCache", "Gather", "Split", "Elewise", "Concat")
    before = {name: count(f"{name}Operation") for name in names}
    setups = count("setups")
    packed.decode({0: 4})
    used = {name: count(f"{name}Operation") - before[name] for name in names}
    old_chip = layers if IS_OLD_CHIP else 0  # SwiGLU is a split, an activation and a product there
    assert used == {
        "RmsNorm": 2 * layers + 1,
        "Linear": 4 * layers + 1,
        "Rope": layers,
        "PagedAttention": layers,
        "ReshapeAndCache": layers,
        "Gather": 3,
        "Split": layers + old_chip,
        "Elewise": 2 * layers + old_chip,
        "Concat": 0,
    }
    assert count("setups") - setups == sum(used.values()) + layers  # and an activation each
    before = count("ConcatOperation")
    runner.prefill([[1, 2, 3]])
    assert count("ConcatOperation") - before == 3 * layers  # q, k, v take two, gate and up one


def test_the_object_runs_inside_a_script():
    runner = Runner(Shape(), random_model(Shape()), torch.float16, "npu")

    class Decode(torch.nn.Module):
        def __init__(self, step) -> None:
            super().__init__()
            self.step = step

        def forward(self, inputs: list[torch.Tensor], parameters: str) -> torch.Tensor:
            return self.step.execute(inputs, parameters)[0]

    scripted = torch.jit.script(Decode(runner.encoder))
    inputs, parameters = runner.prefill_inputs([[1, 2, 3, 4]])
    expected = Runner(Shape(), runner.model, torch.float16).prefill([[1, 2, 3, 4]])
    assert relative_error(scripted(inputs, parameters).cpu(), expected) < CPU_TOLERANCE[torch.float16]


def test_execute_out_writes_into_the_callers_tensor():
    pair = Pair(Shape(), torch.float16)
    inputs, parameters = pair.npu.prefill_inputs([[1, 2, 3, 4]])
    out = torch.full((4, Shape().vocab), float("nan"), dtype=torch.float16).to("npu")
    assert pair.npu.encoder.execute_out(inputs, [out], parameters) == 0
    pair.same(out.cpu(), pair.cpu.prefill([[1, 2, 3, 4]]))


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


def test_steady_steps_allocate_and_infer_nothing():
    runner = Runner(Shape(), random_model(Shape()), torch.float16, "npu")
    runner.prefill([[1, 2, 3], [4, 5]])
    for step in range(2):
        runner.decode({0: step, 1: step})
    before = dict(runner.decoder.counters())
    memory = torch.npu.memory_stats()["allocation.all.allocated"]
    inputs, parameters = runner.decode_inputs({0: 7, 1: 8})
    used = torch.npu.memory_stats()["allocation.all.allocated"] - memory
    logits = runner.decoder.execute(inputs, parameters)
    after = dict(runner.decoder.counters())
    assert torch.npu.memory_stats()["allocation.all.allocated"] - memory == used + 1  # the logits
    assert after.pop("executions") == before.pop("executions") + 1
    assert after == before
    del logits


def test_weights_may_lie_in_tiles():
    """Once cast by torch_npu, once as bytes of which set_format_to_nz says so."""
    shape = Shape(hidden=64, intermediate=96, vocab=160)
    layout = Layout(qkv_packed=True, gate_up_packed=True, transposes=(1, 1, 1, 0, 1, 1, 0))
    model = random_model(shape)
    expected = Runner(shape, model, torch.float16, "npu", layout).prefill([[1, 2, 3, 4]])
    for tell in (False, True):
        runner = Runner(shape, model, torch.float16, "npu", layout)
        set_tiled_weights(runner, tell)
        casts = count("LinearOperation")
        assert torch.equal(runner.prefill([[1, 2, 3, 4]]), expected)
        assert count("LinearOperation") > casts
    with pytest.raises(ValueError, match=r"slot must be in \[0, 103\), got 103"):
        runner.encoder.set_format_to_nz(103)
    with pytest.raises(ValueError, match=r"weight 1 must be a matrix to lie in tiles, got float16\[64\]"):
        runner.encoder.set_format_to_nz(1)
    narrow = Runner(Shape(vocab=97), random_model(Shape(vocab=97)), torch.float16, "npu")
    with pytest.raises(ValueError, match=r"weight 102, .* has memory for \d+ bytes: too few for tiles"):
        narrow.encoder.set_format_to_nz(102)


def set_tiled_weights(runner: Runner, tell: bool) -> None:
    """Hands the linear weights of `runner` over in tiles; `tell`: as tensors that do not know it themselves."""
    import json

    from reference import weight_list

    spec = json.loads(runner.encoder.weight_spec())
    weights = [w.to("npu") for w in weight_list(spec, runner.model, runner.layout, runner.dtype)]
    matrices = [e["slot"] for e in spec if len(e["shape"]) == 2 and e["name"] != "embedding.weight"]
    torch.npu.config.allow_internal_format = True
    for slot in matrices:
        cast = torch_npu.npu_format_cast(weights[slot], 29)
        assert torch_npu.get_npu_format(cast) == 29
        weights[slot] = same_bytes(cast) if tell else cast
    torch.npu.config.allow_internal_format = False
    runner.encoder.set_weight(weights)
    for slot in matrices if tell else []:
        assert runner.encoder.set_format_to_nz(slot) == 0


def same_bytes(tiled_weight: torch.Tensor) -> torch.Tensor:
    """A plain tensor whose memory holds the tiles of another: sizes are multiples of 16, so that nothing is padded."""
    rows, columns = tiled_weight.shape
    plain = torch_npu.npu_format_cast(tiled_weight, 2).cpu()
    tiles = plain.view(rows // 16, 16, columns // 16, 16).permute(2, 0, 1, 3).contiguous()
    return tiles.view(rows, columns).to("npu")


def test_formats_are_of_ascend_alone():
    runner = Runner(Shape(), random_model(Shape()), torch.float16)
    with pytest.raises(NotImplementedError, match="only weights on Ascend have formats"):
        runner.encoder.set_format_to_nz(5)


def test_weights_and_caches_must_be_on_one_device():
    runner = Runner(Shape(), random_model(Shape()), torch.float16, "npu")
    with pytest.raises(ValueError, match=r"key cache 0 must be on npu:0 as the weights are, got .* on cpu"):
        runner.encoder.set_kv_cache(*[[c.cpu() for c in runner.caches[n::2]] for n in range(2)])
    inputs, parameters = runner.prefill_inputs([[1, 2]])
    inputs[0] = inputs[0].cpu()
    with pytest.raises(ValueError, match=r"input_ids\) must be on npu:0 as the weights are, got .*cpu"):
        runner.encoder.execute(inputs, parameters)


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


def test_the_mode_is_what_the_environment_says():
    runner = Runner(Shape(), random_model(Shape()), torch.float16, "npu")
    runner.prefill([[1, 2, 3]])
    before = count("operations")
    inputs, parameters = runner.prefill_inputs([[1, 2, 3]])
    runner.encoder.execute(inputs, parameters)
    if IN_LINE:
        assert count("operations") > before
    torch.npu.synchronize()
    assert count("operations") > before
