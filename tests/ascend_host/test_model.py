"""The Qwen2 model on device npu: against transformers and against the CPU, in every configuration of test_parity.py."""

from __future__ import annotations

import pytest
import torch
import torch_npu
from hypothesis import given
from hypothesis import strategies as st
from pairs import CPU_TOLERANCE, Pair
from reference import Layout, Runner, Shape, random_model, relative_error
from stand_in import IN_LINE, IS_OLD_CHIP, count
from test_parity import Comparison, layouts, lengths, random_tokens, shapes

HALVES = [torch.float16, torch.bfloat16]


def tiled(shape: Shape) -> Shape:
    """The shape with head counts whose caches can be cut into tiles, on chips that want them so."""
    return shape if not IS_OLD_CHIP or shape.kv_heads * shape.head_size % 16 == 0 else Shape()


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
    before = {name: count(f"{name}Operation") for name in ("Concat", "Gather")}
    runner.prefill([[1, 2, 3]], [2])
    assert count("ConcatOperation") - before["Concat"] == 3 * layers  # q, k, v take two, gate and up one
    assert count("GatherOperation") - before["Gather"] == 5  # embedding, cos, sin; rows of attention and of hidden


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
