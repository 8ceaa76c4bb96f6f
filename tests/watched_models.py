"""Our model over a random one of transformers, and a watch on the steps that it runs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import strategies as st
from reference import Shape
from transformers import Qwen2ForCausalLM

from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM

SHAPE = Shape()


def runner(reference: Qwen2ForCausalLM, **options: object) -> FlashQwen2ForCausalLM:
    """Our model over the weights of transformers' model; 8 blocks of 16 unless asked."""
    chosen = {"dtype": "float32", "block_size": 16, "num_blocks": 8, **options}
    return FlashQwen2ForCausalLM(reference.config, reference.state_dict(), **chosen)


@dataclass
class Step:
    """One call of forward: its phase, the contexts of its sequences, and which sequences they are."""

    is_prefill: bool
    lengths: list[int]


def watched(model: FlashQwen2ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The steps that the model runs from now on."""
    steps: list[Step] = []
    original = model.forward

    def forward(*arguments, **keywords):
        steps.append(Step(arguments[2], arguments[6].tolist()))
        return original(*arguments, **keywords)

    monkeypatch.setattr(model, "forward", forward)
    return steps


@st.composite
def small_shapes(draw) -> Shape:
    kv_heads = draw(st.sampled_from([1, 2]))
    return Shape(
        heads=kv_heads * draw(st.sampled_from([1, 3])),
        kv_heads=kv_heads,
        layers=draw(st.integers(1, 2)),
        hidden=draw(st.sampled_from([32, 48])),
        vocab=draw(st.sampled_from([11, 60, 151])),
        tied=draw(st.booleans()),
        max_positions=64,
    )


GOOD = [1, 2, 3]
