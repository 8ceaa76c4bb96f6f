"""What the contract leaves unused, inputs and weight slots, may be anything."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from contract_callers import (
    NAMES,
    PLACES,
    SHAPE,
    both_generations,
    good_parameters,
    hand_made_weights,
    reference_model,
    set_param,
)
from reference import Layout, Runner

pytestmark = pytest.mark.usefixtures("one_thread")

UNUSED = {
    "prefill": ["blocks", "cache_idx", "offset", "placeholder"],
    "decode": ["mask", "cache_idx", "offset", "placeholder", "indices"],
}


ANYTHING = {
    "float64": torch.zeros(1, dtype=torch.float64),
    "bool": torch.ones(1, dtype=torch.bool),
    "complex": torch.ones(3, dtype=torch.complex64),
    "int16": torch.ones(2, 2, dtype=torch.int16),
    "float16": torch.zeros(1, dtype=torch.float16),
    "meta": torch.zeros(5, device="meta"),
    "empty": torch.zeros(0),
    "scalar": torch.tensor(1.0),
    "rank 9": torch.zeros([1] * 9),
    "strided": torch.zeros(4, 6).t()[::2],
    "sparse": torch.eye(3).to_sparse(),
    "NaN": torch.full((7, 3), float("nan")),
}


class Step:
    """A prefill or decode step whose inputs can be replaced, and the logits that it gives."""

    def __init__(self, phase: str, generation: str) -> None:
        runner = Runner(SHAPE, reference_model(), layout=Layout(NAMES[generation]))
        inputs, self.text = runner.prefill_inputs([[1, 2, 3], [4, 5]])
        self.made, self.inputs = runner.encoder, inputs
        if phase == "decode":
            runner.encoder.execute(inputs, self.text)
            self.made = runner.decoder
            self.inputs, self.text = runner.decode_inputs({0: 6, 1: 7})
        self.places = PLACES[generation]
        self.expected = self.run({})

    def run(self, changes: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = list(self.inputs)
        for name, tensor in changes.items():
            inputs[self.places[name]] = tensor
        (logits,) = self.made.execute(inputs, self.text)
        return logits


@cache
def step(phase: str, generation: str) -> Step:
    return Step(phase, generation)


@pytest.mark.parametrize("what", ANYTHING)
@both_generations
@pytest.mark.parametrize("phase", UNUSED)
def test_inputs_that_a_phase_does_not_use_may_be_anything(phase, generation, what):
    aim = step(phase, generation)
    for name in UNUSED[phase]:
        assert torch.equal(aim.run({name: ANYTHING[what]}), aim.expected)
    assert torch.equal(aim.run(dict.fromkeys(UNUSED[phase], ANYTHING[what])), aim.expected)


@both_generations
@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(torch.ones(1), id="placeholder"),
        pytest.param(torch.zeros(1, 1, dtype=torch.bfloat16), id="1x1"),
        pytest.param(torch.tensor(0.0), id="scalar"),
        pytest.param(torch.zeros(3, 3), id="longest prompt"),
        pytest.param(torch.ones(128, 128, dtype=torch.bfloat16).triu(1), id="128x128"),
        pytest.param(torch.full((128, 128), float("-inf"), dtype=torch.float16).triu(1), id="fp16"),
        pytest.param(torch.ones(2048, 2048, dtype=torch.int8), id="int8"),
        pytest.param(torch.full((5, 5), float("nan")), id="NaN"),
        pytest.param(torch.zeros(4, 4, device="meta"), id="meta"),
        pytest.param(torch.zeros(8, 8)[::2, ::2], id="strided"),
    ],
)
def test_attention_is_causal_whatever_a_square_mask_or_a_placeholder_holds(generation, mask):
    aim = step("prefill", generation)
    assert torch.equal(aim.run({"mask": mask}), aim.expected)


@both_generations
@pytest.mark.parametrize("size", [(5,), (1, 5, 5), (2, 5, 5), (5, 6), (1, 5), (1, 1, 5, 5)], ids=str)
def test_a_mask_of_any_other_shape_is_refused_in_prefill_and_ignored_in_decode(generation, size):
    mask = torch.zeros(size)
    with pytest.raises(ValueError, match=r"attention_mask.*square") as error:
        step("prefill", generation).run({"mask": mask})
    assert str(list(size)) in str(error.value)
    aim = step("decode", generation)
    assert torch.equal(aim.run({"mask": mask}), aim.expected)


@pytest.mark.parametrize("what", ANYTHING)
@pytest.mark.parametrize("packed", [False, True])
def test_weight_slots_that_the_parameters_make_unused_may_be_anything(what, packed):
    unused = ANYTHING[what]
    keys = {"packQuantType": [[1, 1] if packed else [4, 4]] * 2, "linearQuantType": [[0] * 7] * 2}
    options = {"packed": [(packed, packed)] * 2, "norm_bias": unused}
    model = reference_model()
    made = set_param("2024", {**good_parameters("2024"), **keys})
    for placeholder in (None, unused):
        weights = hand_made_weights(model, SHAPE, torch.float32, placeholder=placeholder, **options)
        made.set_weight(weights)
        runner = Runner(SHAPE, model)
        made.set_kv_cache(runner.caches[0::2], runner.caches[1::2])
        inputs, text = runner.prefill_inputs([[1, 2, 3], [4, 5]])
        torch.testing.assert_close(made.execute(inputs, text)[0], step("prefill", "2024").expected)
