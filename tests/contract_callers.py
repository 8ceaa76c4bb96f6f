"""Callers of both generations of the contract: parameters, weight lists and the inputs of their steps."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from reference import Layout, Shape, parameters, random_model, reference_logits, relative_error, tables
from transformers import Qwen2ForCausalLM

NAMES = {"2024": "qwen_PAModel", "current": "qwen_QwenDecoderModel"}


SHAPE = Shape()


BFLOAT16_FACTOR = 1.5


FLOAT32_TOLERANCE = 1e-4


both_generations = pytest.mark.parametrize("generation", NAMES)


@cache
def reference_model(shape: Shape = SHAPE, seed: int = 0) -> Qwen2ForCausalLM:
    return random_model(shape, seed)


def new(name: str) -> torch.ScriptObject:
    return torch.classes.ModelTorch.ModelTorch(name)


def good_parameters(generation: str, is_prefill: bool = True) -> dict:
    return parameters(SHAPE, Layout(NAMES[generation]), torch.float32, is_prefill)


def set_param(generation: str, given: dict) -> torch.ScriptObject:
    """Sets the parameters; any warning is an error."""
    made = new(NAMES[generation])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.set_param(json.dumps(given)) == 0
    return made


def hand_made_weights(
    model: Qwen2ForCausalLM,
    shape: Shape,
    dtype: torch.dtype,
    *,
    packed: list[tuple[bool, bool]],
    transposes: tuple[int, ...] = (1, 1, 1, 1, 1, 1, 1),
    head_transpose: int = 1,
    placeholder: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    embedding: str = "V",
) -> list[torch.Tensor]:
    """The list of set_weight with the slot numbers of the contract written out; weight_spec() is not asked.

    `packed` says for each layer whether q, k, v and whether gate, up are one weight. `embedding` is "V", "V+1" or
    "none".
    """
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    unused = torch.zeros(1, dtype=torch.float16) if placeholder is None else placeholder
    start = 0 if embedding == "none" else 1
    weights = [unused] * (start + 50 * shape.layers + 2)
    if start == 1:
        table = state["model.embed_tokens.weight"]
        extra = torch.zeros(1, shape.hidden, dtype=dtype)
        weights[0] = torch.cat([table, extra]) if embedding == "V+1" else table

    def put(base: int, column: int, parts: list[str]) -> None:
        matrix = torch.cat([state[f"{part}.weight"] for part in parts])
        weights[base] = matrix if transposes[column] != 0 else matrix.t().contiguous()
        if f"{parts[0]}.bias" in state:
            weights[base + 1] = torch.cat([state[f"{part}.bias"] for part in parts])

    for layer in range(shape.layers):
        base, prefix = start + 50 * layer, f"model.layers.{layer}"
        qkv = [f"{prefix}.self_attn.{part}_proj" for part in "qkv"]
        gate_up = [f"{prefix}.mlp.{part}_proj" for part in ("gate", "up")]
        weights[base] = state[f"{prefix}.input_layernorm.weight"]
        weights[base + 28] = state[f"{prefix}.post_attention_layernorm.weight"]
        if norm_bias is not None:
            weights[base + 1] = weights[base + 29] = norm_bias
        if packed[layer][0]:
            put(base + 4, 0, qkv)
        else:
            for column, part in enumerate(qkv):
                put(base + 4 + 6 * column, column, [part])
        put(base + 22, 3, [f"{prefix}.self_attn.o_proj"])
        if packed[layer][1]:
            put(base + 32, 4, gate_up)
        else:
            put(base + 32, 4, gate_up[:1])
            put(base + 38, 5, gate_up[1:])
        put(base + 44, 6, [f"{prefix}.mlp.down_proj"])
    head = state["lm_head.weight"]
    weights[-2] = state["model.norm.weight"]
    weights[-1] = head.t().contiguous() if head_transpose == 0 else head
    return weights


@dataclass
class Caller:
    """What a Python front end does around the two objects. Blocks are handed out one after the other."""

    shape: Shape
    dtype: torch.dtype
    is_current: bool
    encoder: torch.ScriptObject
    decoder: torch.ScriptObject
    block_size: int = 128
    embedding: torch.Tensor | None = None
    prefill_mask: torch.Tensor | None = None
    decode_mask: torch.Tensor | None = None
    tokens: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = (8, self.block_size, self.shape.kv_heads, self.shape.head_size)
        keys, values = (
            [torch.full(size, float("nan"), dtype=self.dtype) for _ in range(self.shape.layers)] for _ in range(2)
        )
        for made in (self.encoder, self.decoder):
            assert made.set_kv_cache(keys, values) == 0
        self.cos, self.sin = tables(self.shape, self.dtype)
        self.one = torch.ones(1, dtype=self.dtype)

    def _list(self, ids, positions, mask, slots, lengths, indices) -> list[torch.Tensor]:
        first = torch.tensor(ids, dtype=torch.int64)
        if self.embedding is not None:
            first = self.embedding[first]
        head = [
            first,
            torch.tensor(positions, dtype=torch.int64),
            self.cos,
            self.sin,
            self.one if mask is None else mask,
            torch.arange(len(lengths), dtype=torch.int32)[:, None],
            torch.tensor(slots, dtype=torch.int32),
            self.one,
            self.one,
        ]
        seq_len = torch.tensor(lengths, dtype=torch.int32)
        return [*head, self.one, seq_len, indices] if self.is_current else [*head, seq_len, indices, self.one]

    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        self.tokens = [list(prompt) for prompt in prompts]
        lengths = [len(prompt) for prompt in prompts]
        positions = [place for length in lengths for place in range(length)]
        slots = [n * self.block_size + place for n, length in enumerate(lengths) for place in range(length)]
        ids = [token for prompt in prompts for token in prompt]
        indices = torch.tensor(lengths, dtype=torch.int64).cumsum(0) - 1
        inputs = self._list(ids, positions, self.prefill_mask, slots, lengths, indices)
        (logits,) = self.encoder.execute(inputs, json.dumps({"seqLen": lengths}))
        return logits

    def decode(self, new: list[int]) -> torch.Tensor:
        for sequence, token in zip(self.tokens, new, strict=True):
            sequence.append(token)
        lengths = [len(sequence) for sequence in self.tokens]
        positions = [length - 1 for length in lengths]
        slots = [n * self.block_size + place for n, place in enumerate(positions)]
        inputs = self._list(new, positions, self.decode_mask, slots, lengths, torch.zeros(1, dtype=self.dtype))
        (logits,) = self.decoder.execute(inputs, json.dumps({"seqLen": lengths}))
        return logits

    def check(self, logits: torch.Tensor, model: Qwen2ForCausalLM) -> None:
        """Compares the last row of every sequence with transformers in this dtype and in float64."""
        same = copy.deepcopy(model).to(self.dtype)
        theirs = torch.stack([reference_logits(same, sequence)[-1] for sequence in self.tokens])
        exact = torch.stack([reference_logits(same.double(), sequence)[-1] for sequence in self.tokens])
        assert logits.shape == theirs.shape
        assert logits.dtype == self.dtype
        assert torch.isfinite(logits).all()
        if self.dtype == torch.float32:
            assert relative_error(logits, theirs) < FLOAT32_TOLERANCE
        else:
            assert relative_error(logits, exact) <= BFLOAT16_FACTOR * relative_error(theirs, exact)

    def run(self, model: Qwen2ForCausalLM, prompts: list[list[int]], steps: int = 3) -> None:
        """Prefill and a few greedy decode steps, each checked against transformers."""
        logits = self.prefill(prompts)
        self.check(logits, model)
        for _ in range(steps):
            logits = self.decode(logits.argmax(-1).tolist())
            self.check(logits, model)


def make_pair(name: str, prefill: dict, decode: dict, weights: list[torch.Tensor]) -> list[torch.ScriptObject]:
    """The order of calls of a front end: set_param on all, then the same weights for all."""
    pair = [new(name) for _ in range(2)]
    for made, given in zip(pair, (prefill, decode), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert made.set_param(json.dumps(given)) == 0
    for made in pair:
        assert made.set_weight(weights) == 0
    return pair


PLACES = {
    "2024": {"mask": 4, "blocks": 5, "cache_idx": 7, "offset": 8, "indices": 10, "placeholder": 11},
    "current": {"mask": 4, "blocks": 5, "cache_idx": 7, "offset": 8, "placeholder": 9, "indices": 11},
}
