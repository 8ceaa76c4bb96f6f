"""`modeltorch bench --nodes` and benchmarks/plot.py: bytes, operations and times of the nodes of a step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from reference import DEVICES

from modeltorch import cli, shapes
from modeltorch.limits import decode_bytes, prefill_flops
from modeltorch.node_costs import check_device, node_costs
from modeltorch.subject import Subject

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import plot

GRAPH = """plan for 4 tokens, 2 sequences, 2 logit rows; arena 9 bytes
  embedding = GatherRows(embedding.weight bfloat16[512, 8], input_ids int64[4]) -> embedding bfloat16[4, 8]
  layers.0.attn.qkv = FusedLinear(embedding bfloat16[4, 8], layers.0.attn.norm.weight bfloat16[8], \
layers.0.attn.q.weight bfloat16[8, 8], layers.0.attn.q.bias bfloat16[8], layers.0.attn.k.weight bfloat16[4, 8]) -> \
layers.0.attn.qkv bfloat16[4, 12]
  layers.0.attn.rope = RopeAttention(layers.0.attn.qkv bfloat16[4, 12], layers.0.k_cache bfloat16[99, 16, 1, 4], \
slots int32[4], seq_len int32[2]{tables}) -> layers.0.attn.rope bfloat16[4, 8]
memory plan
  0 + 64  embedding
"""


def test_bytes_and_operations_are_counted_from_the_shapes():
    embedding, qkv, attention = node_costs(GRAPH.format(tables=""), [3, 1], True)
    assert (embedding.name, embedding.operation) == ("embedding", "GatherRows")
    assert (embedding.moved, embedding.flops) == (2 * 4 * 8 * 2 + 4 * 8, 0)
    assert qkv.flops == 2 * 4 * 8 * (8 + 4)
    assert qkv.moved == 2 * (4 * 8 + 8 + 8 * 8 + 8 + 4 * 8 + 4 * 12)
    assert attention.flops == 4 * (3 + 2 + 1 + 1) * 8
    assert attention.moved == 2 * (4 * 12 + 4 * 4 + 4 * 8) + 4 * 4 + 2 * 4


def test_attention_over_a_cache_reads_the_context():
    attention = node_costs(GRAPH.format(tables=", block_tables int32[4, 2]"), [30, 20], False)[2]
    assert attention.flops == 4 * 50 * 8
    assert attention.moved == 2 * (4 * 12 + 50 * 4 + 4 * 8) + 4 * 4 + 2 * 4 + 4 * 4 * 2


@pytest.fixture
def tiny(monkeypatch) -> str:
    monkeypatch.setitem(shapes.SHAPES, "tiny", shapes.Qwen2Shape(512, 64, 128, 3, 4, 2, False, 1024))
    return "tiny"


OPTIONS = ["--runs", "1", "--requests", "0", "--prefill-batch", "2", "--decode-batch", "2"]
SIZES = ["--prompt-len", "64", "--context", "128"]


@pytest.mark.parametrize("device", DEVICES)
def test_the_nodes_of_a_step_add_up_to_the_step(tiny, tmp_path, device):
    file = tmp_path / "nodes.jsonl"
    assert cli.main(["bench", "--shape", tiny, "--device", device, *OPTIONS, *SIZES, "--nodes", str(file)]) == 0
    prefill, decode = map(json.loads, file.read_text().splitlines())
    model = Subject.from_shape(tiny, device, "bfloat16").model
    assert (prefill["workload"], decode["workload"]) == ("prefill_b2_s64", "decode_b2_ctx128")
    assert sum(node["flops"] for node in prefill["nodes"]) == prefill_flops(model, [64, 64])
    # Beside the weights and the cache a step moves its activations, which such a small model has many of.
    moved = sum(node["bytes"] for node in decode["nodes"])
    assert decode_bytes(model, 2, 128) < moved < 2 * decode_bytes(model, 2, 128)
    for step in (prefill, decode):
        assert step["device"] == device
        assert step["read_gb_s"] > 0
        assert step["multiply_gflop_s"] > 0
        assert all(node["us"] > 0 for node in step["nodes"])
        linears = [kind for kind in plot.kinds(step["nodes"]) if kind.name in ("attn.o", "mlp.down")]
        assert [kind.count for kind in linears] == [3, 3]


def test_pictures_are_drawn(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    nodes = [
        {"name": f"layers.{layer}.{name}", "operation": "Linear", "us": us, "bytes": 1000, "flops": flops}
        for layer in range(2)
        for name, us, flops in [("down", 9.0, 5000), ("up", 7.0, 5000), *((f"n{n}", 1.0, 0) for n in range(15))]
    ]
    kinds = plot.kinds(nodes)
    assert [kind.name for kind in kinds[:2]] == ["down", "up"]
    assert (kinds[0].count, kinds[0].us, kinds[0].moved, kinds[0].flops) == (2, 18.0, 2000, 10_000)
    assert len(kinds) == plot.MOST + 1
    assert sum(kind.us for kind in kinds) == sum(node["us"] for node in nodes)
    step = {"model": "m", "workload": "w", "dtype": "bfloat16", "hardware": "h", "torch": "t", "commit": "c"}
    rates = {"device": "cpu", "read_gb_s": 10.0, "multiply_gflop_s": 1000.0, "nodes": nodes}
    path = plot.draw(step | rates, tmp_path)
    assert path == tmp_path / "m-w-cpu.png"
    assert 10_000 < path.stat().st_size < 100_000


def test_a_device_whose_nodes_nothing_times_is_refused():
    with pytest.raises(NotImplementedError, match="not on meta"):
        check_device(torch.device("meta"))
