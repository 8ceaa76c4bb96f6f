"""Model objects with random weights, their caches and their steps, for the tests of the object."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from reference import Layout, Runner, Shape, parameters, random_model, weight_list

SHAPE = Shape()


PROMPTS = [[1, 2, 3], [4, 5]]


GENERATIONS = {"2024": Layout("qwen_PAModel"), "current": Layout("qwen_QwenDecoderModel")}


PHASES = ["prefill", "decode"]


INPUT_NAMES = {
    "2024": [
        "input_ids",
        "position_ids",
        "cos_table",
        "sin_table",
        "attention_mask",
        "block_tables",
        "slots",
        "kv_cache_idx",
        "token_offset",
        "seq_len",
        "logits_indices",
        "placeholder",
    ],
    "current": [
        "input_ids",
        "position_ids",
        "cos_table",
        "sin_table",
        "attention_mask",
        "block_tables",
        "slots",
        "kv_cache_idx",
        "token_offset",
        "placeholder",
        "seq_len",
        "logits_indices",
    ],
}


READ_INPUTS = {
    "prefill": {
        "input_ids": torch.int64,
        "position_ids": torch.int64,
        "cos_table": torch.float32,
        "sin_table": torch.float32,
        "slots": torch.int32,
        "seq_len": torch.int32,
        "logits_indices": torch.int64,
    },
    "decode": {
        "input_ids": torch.int64,
        "position_ids": torch.int64,
        "cos_table": torch.float32,
        "sin_table": torch.float32,
        "block_tables": torch.int32,
        "slots": torch.int32,
        "seq_len": torch.int32,
    },
}


@cache
def reference_model(seed: int = 0):
    return random_model(SHAPE, seed)


def new(name: str = "qwen_PAModel") -> torch.ScriptObject:
    return torch.classes.ModelTorch.ModelTorch(name)


def parameter_text(is_prefill: bool = True, layout: Layout = GENERATIONS["2024"], **changes) -> str:
    return json.dumps({**parameters(SHAPE, layout, torch.float32, is_prefill), **changes})


def make_runner(seed: int = 0, generation: str = "2024", **options) -> Runner:
    return Runner(SHAPE, reference_model(seed), layout=GENERATIONS[generation], seed=seed, **options)


def weights_of(made: torch.ScriptObject, seed: int = 0, device: str = "cpu") -> list[torch.Tensor]:
    weights = weight_list(json.loads(made.weight_spec()), reference_model(seed), Layout(), torch.float32)
    return [weight.to(device) for weight in weights]


def new_caches(fill: float = float("nan"), device: str = "cpu", **changes) -> list[torch.Tensor]:
    options = {"blocks": 8, "block_size": 16, "kv_heads": SHAPE.kv_heads, "head_size": SHAPE.head_size}
    sizes = tuple({**options, **changes}.values())
    return [torch.full(sizes, fill, device=device) for _ in range(SHAPE.layers)]


def bits(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies that compare equal where they hold the same bits, NaN included."""
    return [tensor.view(torch.int32).clone() for tensor in tensors]


def same_bits(tensors: list[torch.Tensor], before: list[torch.Tensor]) -> bool:
    return all(torch.equal(tensor.view(torch.int32), old) for tensor, old in zip(tensors, before, strict=True))


class Prefill:
    """A prefill object with weights and caches, and one step that it can run again and again."""

    def __init__(self, device: str = "cpu") -> None:
        runner = make_runner(device=device)
        self.made, self.caches = runner.encoder, runner.caches
        self.step = runner.prefill_inputs(PROMPTS)

    def logits(self) -> torch.Tensor:
        return self.made.execute(*self.step)[0]


def shape_text(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


@dataclass
class Call:
    """One call that can be spoilt: tensors by name, and the parameters."""

    tensors: dict[str, torch.Tensor]
    parameters: object
    extra: list[torch.Tensor] = field(default_factory=list)

    def arguments(self) -> tuple[list[torch.Tensor], str]:
        text = self.parameters if isinstance(self.parameters, str) else json.dumps(self.parameters)
        return [*self.tensors.values(), *self.extra], text


class Target:
    """An object in one phase and generation, with a good call whose cache rows are not written yet."""

    def __init__(self, phase: str, generation: str) -> None:
        self.phase, self.generation = phase, generation
        self.runner = make_runner(generation=generation)
        self.made = self.runner.encoder if phase == "prefill" else self.runner.decoder
        inputs, text = self.runner.prefill_inputs(PROMPTS, indices=[4, 2])
        if phase == "decode":
            self.runner.encoder.execute(inputs, text)
            inputs, text = self.runner.decode_inputs({0: 6, 1: 7})
        self.inputs, self.parameters = inputs, json.loads(text)
        self.caches_before = [tensor.clone() for tensor in self.runner.caches]
        self.expected = self.run()

    def call(self) -> Call:
        names = INPUT_NAMES[self.generation]
        tensors = dict(zip(names, self.inputs, strict=True))
        return Call(tensors, json.loads(json.dumps(self.parameters)))

    def run(self, call: Call | None = None) -> torch.Tensor:
        """The good step, or another one; afterwards the caches are as before it."""
        result = self.made.execute(*(call or self.call()).arguments())
        assert len(result) == 1
        self.restore()
        return result[0]

    def restore(self) -> None:
        for tensor, before in zip(self.runner.caches, self.caches_before, strict=True):
            tensor.copy_(before)

    def check_refused(self, call: Call, error: type[Exception], mentions: tuple[str, ...]) -> None:
        """The call raises `error` naming `mentions`, writes nothing, and the object works on as before."""
        self.restore()
        before = bits(self.caches_before)
        executions = self.made.counters()["executions"]
        inputs, text = call.arguments()
        with pytest.raises(error) as caught:
            self.made.execute(inputs, text)
        assert type(caught.value) is error
        for mention in ("execute", *mentions):
            assert mention in str(caught.value)
        out = torch.full_like(self.expected, 7.0)
        with pytest.raises(error):
            self.made.execute_out(inputs, [out], text)
        assert (out == 7.0).all()
        assert same_bits(self.runner.caches, before)
        assert self.made.counters()["executions"] == executions
        assert torch.equal(self.run(), self.expected)


@cache
def target(phase: str, generation: str = "2024") -> Target:
    return Target(phase, generation)


both_phases = pytest.mark.parametrize("phase", PHASES)


both_generations = pytest.mark.parametrize("generation", GENERATIONS)
