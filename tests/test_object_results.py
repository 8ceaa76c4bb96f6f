"""What a step returns, and what the object says of itself."""

from __future__ import annotations

import json
import re

import pytest
import torch
from model_objects import (
    GENERATIONS,
    PROMPTS,
    SHAPE,
    Prefill,
    bits,
    both_generations,
    both_phases,
    make_runner,
    new,
    new_caches,
    parameter_text,
    reference_model,
    same_bits,
    target,
    weights_of,
)
from reference import parameters, weight_list

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- outputs ---------------------------------------------------------------------------------------


@both_phases
@both_generations
def test_execute_out_writes_what_execute_returns(phase, generation):
    aim = target(phase, generation)
    out = torch.full_like(aim.expected, float("nan"))
    inputs, text = aim.call().arguments()
    assert aim.made.execute_out(inputs, [out], text) == 0
    aim.restore()
    assert torch.equal(out, aim.expected)


FAULTY_OUTPUTS = {
    "none": (lambda out: [], ("1 output", "got 0")),
    "two": (lambda out: [out, out.clone()], ("1 output", "got 2")),
    "one row more": (lambda out: [torch.cat([out, out[:1]])], ("output 0", f"[3, {SHAPE.vocab}]")),
    "one row less": (lambda out: [out[:1]], ("output 0", f"[1, {SHAPE.vocab}]")),
    "one column less": (lambda out: [out[:, 1:].contiguous()], ("output 0", f"[2, {SHAPE.vocab - 1}]")),
    "flat": (lambda out: [out.view(-1)], ("output 0", f"[{2 * SHAPE.vocab}]")),
    "rank 3": (lambda out: [out[None]], ("output 0", f"[1, 2, {SHAPE.vocab}]")),
    "bfloat16": (lambda out: [out.bfloat16()], ("output 0", "float32", "bfloat16")),
    "float64": (lambda out: [out.double()], ("output 0", "float32")),
    "int32": (lambda out: [out.int()], ("output 0", "float32", "int32")),
    "meta": (lambda out: [out.to("meta")], ("output 0", "cpu")),
    "transposed": (lambda out: [out.t().contiguous().t()], ("output 0", "contiguous")),
    "with gaps": (lambda out: [torch.stack([out, out], -1)[..., 0]], ("output 0", "contiguous")),
    "expanded": (lambda out: [out[:1].expand(2, -1)], ("output 0", "contiguous")),
}


@both_phases
@pytest.mark.parametrize("fault", FAULTY_OUTPUTS)
def test_execute_out_refuses_tensors_that_cannot_take_the_logits(phase, fault):
    aim = target(phase)
    make, mentions = FAULTY_OUTPUTS[fault]
    outputs = make(torch.full_like(aim.expected, 7.0))
    inputs, text = aim.call().arguments()
    with pytest.raises(ValueError, match="execute_out") as error:
        aim.made.execute_out(inputs, outputs, text)
    for mention in mentions:
        assert mention in str(error.value)
    for out in outputs:
        assert out.is_meta or (out == 7).all()
    assert same_bits(aim.runner.caches, bits(aim.caches_before))
    assert torch.equal(aim.run(), aim.expected)


def test_execute_returns_fresh_contiguous_tensors():
    prefill = Prefill()
    first, second = prefill.logits(), prefill.logits()
    assert first.is_contiguous()
    assert first.data_ptr() != second.data_ptr()
    kept = first.clone()
    second.fill_(0)
    prefill.logits()
    assert torch.equal(first, kept)


@both_phases
@both_generations
def test_execute_never_returns_an_empty_list(phase, generation):
    aim = target(phase, generation)
    call = aim.call()
    for name in ("input_ids", "position_ids", "slots", "seq_len", "logits_indices"):
        call.tensors[name] = call.tensors[name][:0]
    call.tensors["block_tables"] = call.tensors["block_tables"][:0]
    call.parameters = {"seqLen": []}
    (logits,) = aim.made.execute(*call.arguments())
    assert logits.shape == (0, SHAPE.vocab)
    assert aim.made.execute_out(call.arguments()[0], [logits], call.arguments()[1]) == 0
    assert torch.equal(aim.run(), aim.expected)


def test_a_prefill_without_logits_rows_still_fills_the_cache():
    aim = target("prefill")
    call = aim.call()
    call.tensors["logits_indices"] = torch.zeros(0, dtype=torch.int64)
    (logits,) = aim.made.execute(*call.arguments())
    assert logits.shape == (0, SHAPE.vocab)
    rows = call.tensors["slots"].long()
    for tensor in aim.runner.caches:
        assert torch.isfinite(tensor.view(-1, SHAPE.kv_heads, SHAPE.head_size)[rows]).all()
    aim.run()


# ---- the extras ------------------------------------------------------------------------------------


def test_progress_is_zero_before_the_weights_and_one_after():
    made = new()
    assert made.progress() == 0.0
    made.set_param(parameter_text())
    assert made.progress() == 0.0
    made.set_weight(weights_of(made))
    assert made.progress() == 1.0
    made.set_kv_cache(new_caches(), new_caches())
    assert made.progress() == 1.0
    made.set_param(parameter_text())
    assert made.progress() == 0.0


def test_counters_count_what_the_object_does():
    prefill = Prefill()
    documented = {
        "executions",
        "shape_inferences",
        "kernel_setups",
        "plans",
        "plans_built",
        "plans_evicted",
        "arena_allocations",
        "arena_bytes",
        "packed_files_read",
        "packed_files_written",
    }
    before = dict(prefill.made.counters())
    assert documented <= set(before)
    assert set(before.values()) == {0}
    prefill.logits()
    after = dict(prefill.made.counters())
    assert after["executions"] == after["plans"] == after["plans_built"] == after["arena_allocations"] == 1
    assert after["shape_inferences"] == after["kernel_setups"] > SHAPE.layers
    assert after["arena_bytes"] > 0
    prefill.logits()
    assert dict(prefill.made.counters()) == {**after, "executions": 2}


@both_generations
def test_graph_prints_nodes_tensors_shapes_and_the_memory_plan(generation):
    runner = make_runner(generation=generation)
    made = runner.encoder
    before = made.graph()
    assert "no step has run" in before
    runner.prefill(PROMPTS)
    text = made.graph()
    for line in before.splitlines()[1:]:
        node, operation = line.split(" = ")
        assert f"{node} = {operation}(" in text
    for entry in json.loads(made.weight_spec()):
        assert entry["name"] in text
    # Five tokens run in the bucket of eight.
    assert f"input_ids int64[8]) -> embedding float32[8, {SHAPE.hidden}]" in text
    assert f"logits float32[8, {SHAPE.vocab}]" in text
    for layer in range(SHAPE.layers):
        assert f"layers.{layer}.k_cache float32[64, 16, {SHAPE.kv_heads}, {SHAPE.head_size}]" in text
    plan = re.findall(r"^  (\d+) \+ (\d+)  (\S+)$", text, re.MULTILINE)
    arena = made.counters()["arena_bytes"]
    assert max(int(offset) + int(size) for offset, size, _ in plan) <= arena
    assert sum(int(size) for _, size, _ in plan) > arena, "tensors whose lives do not meet share memory"
    for name in ("embedding", "layers.0.attn.qkv", f"layers.{SHAPE.layers - 1}.mlp.swiglu"):
        assert name in {row[2] for row in plan}


LAYER_SLOTS = {
    "attn.norm.weight": 0,
    "attn.q.weight": 4,
    "attn.q.bias": 5,
    "attn.k.weight": 10,
    "attn.k.bias": 11,
    "attn.v.weight": 16,
    "attn.v.bias": 17,
    "attn.o.weight": 22,
    "mlp.norm.weight": 28,
    "mlp.gate.weight": 32,
    "mlp.up.weight": 38,
    "mlp.down.weight": 44,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both_generations
def test_weight_spec_describes_every_slot_in_use(generation, dtype):
    layout = GENERATIONS[generation]
    made = new(layout.model_name)
    made.set_param(json.dumps(parameters(SHAPE, layout, dtype, True)))
    spec = json.loads(made.weight_spec())
    last = 50 * SHAPE.layers
    expected = {"embedding.weight": 0, "final_norm.weight": last + 1, "lm_head.weight": last + 2}
    for layer in range(SHAPE.layers):
        for name, slot in LAYER_SLOTS.items():
            expected[f"layers.{layer}.{name}"] = 1 + 50 * layer + slot
    assert {entry["name"]: entry["slot"] for entry in spec} == expected
    assert [entry["slot"] for entry in spec] == sorted(entry["slot"] for entry in spec)
    weights = weight_list(spec, reference_model(), layout, dtype)
    sizes = {
        "hidden": SHAPE.hidden,
        "vocab": SHAPE.vocab,
        "vocab or vocab + 1": SHAPE.vocab,
        "intermediate": SHAPE.intermediate,
    }
    for entry in spec:
        assert {"name", "slot", "shape", "dtype", "shard"} <= set(entry)
        assert [sizes.get(size, size) for size in entry["shape"]] == list(weights[entry["slot"]].shape)
        assert entry["dtype"] == ("bfloat16" if dtype == torch.bfloat16 else "float")
    shards = {entry["name"]: entry["shard"] for entry in spec}
    assert shards["layers.0.attn.q.weight"] == "heads"
    assert shards["layers.0.attn.k.weight"] == "kv_heads"
    assert shards["layers.0.attn.o.weight"] == shards["layers.0.mlp.down.weight"] == "columns"
    assert shards["layers.0.mlp.gate.weight"] == shards["lm_head.weight"] == "rows"
    assert shards["final_norm.weight"] == "none"
