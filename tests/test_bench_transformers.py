"""benchmarks/bench_transformers.py: the steps of modeltorch that it times are those of an answer."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM
from modeltorch.shapes import Qwen2Shape
from modeltorch.subject import Subject

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import bench_transformers


def test_its_prefill_and_its_decode_step_choose_a_token_a_sequence():
    shape = Qwen2Shape(64, 64, 128, 2, 1, 1, False, max_position_embeddings=512)
    weights = shape.random_weights(torch.float32, "cpu")
    model = FlashQwen2ForCausalLM(shape, weights, num_blocks=64, block_size=16)
    subject = Subject("tiny", model)
    prefill = bench_transformers.my_prefill(subject, 5)
    assert torch.equal(prefill(), prefill())
    assert prefill().shape == (1,)
    assert bench_transformers.my_decode(subject, 3, 20)().shape == (3,)
