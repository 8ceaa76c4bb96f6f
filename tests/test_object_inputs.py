"""Inputs of a step of the wrong number, dtype, device, layout or size are refused by name."""

from __future__ import annotations

import pytest
import torch
from model_objects import PHASES, READ_INPUTS, both_generations, both_phases, shape_text, target

pytestmark = pytest.mark.usefixtures("one_thread")

read_inputs = pytest.mark.parametrize(
    ("phase", "name"), [(phase, name) for phase in PHASES for name in READ_INPUTS[phase]]
)


@both_generations
@both_phases
@pytest.mark.parametrize("count", [0, 1, 11, 13, 24])
def test_a_wrong_number_of_inputs_is_refused(phase, generation, count):
    call = target(phase, generation).call()
    tensors = list(call.tensors.items())
    call.tensors = dict(tensors[:count])
    call.extra = [torch.zeros(1)] * (count - 12)
    target(phase, generation).check_refused(call, ValueError, ("12 inputs", f"got {count}"))


OTHER_DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.bool,
]


@pytest.mark.parametrize(
    ("phase", "name", "dtype"),
    [
        (phase, name, dtype)
        for phase in PHASES
        for name, expected in READ_INPUTS[phase].items()
        for dtype in OTHER_DTYPES
        if dtype != expected
    ],
    ids=str,
)
def test_an_input_of_another_dtype_is_refused_by_name(phase, name, dtype):
    call = target(phase).call()
    call.tensors[name] = call.tensors[name].to(dtype)
    kinds = [READ_INPUTS[phase][name], dtype]
    texts = [str(kind).removeprefix("torch.") for kind in kinds if kind not in {torch.float64, torch.int16}]
    target(phase).check_refused(call, ValueError, (name, *texts))


@both_generations
@read_inputs
def test_an_input_on_another_device_is_refused_by_name(phase, name, generation):
    call = target(phase, generation).call()
    call.tensors[name] = call.tensors[name].to("meta")
    target(phase, generation).check_refused(call, ValueError, (name, "cpu"))


@read_inputs
def test_an_input_that_is_not_contiguous_is_refused_by_name(phase, name):
    call = target(phase).call()
    good = call.tensors[name]
    strided = torch.stack([good, good], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    call.tensors[name] = strided
    target(phase).check_refused(call, ValueError, (name, "contiguous"))


@both_generations
@read_inputs
def test_an_input_of_another_rank_is_refused_by_name(phase, name, generation):
    for change in (lambda t: t[None], lambda t: t[..., None], lambda t: t.reshape(-1)[0]):
        call = target(phase, generation).call()
        call.tensors[name] = change(call.tensors[name]).contiguous()
        target(phase, generation).check_refused(call, ValueError, (name,))


def _resized(tensor: torch.Tensor, axis: int, change: int) -> torch.Tensor:
    size = tensor.shape[axis] + change
    return torch.cat([tensor, tensor], dim=axis).narrow(axis, 0, size).contiguous()


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize(
    ("phase", "name", "axis", "mention"),
    [
        # The positions are compared with the ids: the message names either.
        *[(phase, "input_ids", 0, "position_ids") for phase in PHASES],
        *[(phase, "position_ids", 0, "position_ids") for phase in PHASES],
        *[(phase, "slots", 0, "slots") for phase in PHASES],
        *[(phase, "seq_len", 0, "seq_len") for phase in PHASES],
        *[(phase, "cos_table", 1, "cos_table") for phase in PHASES],
        *[(phase, "sin_table", 1, "sin_table") for phase in PHASES],
        *[(phase, "sin_table", 0, "sin_table") for phase in PHASES],
        ("decode", "block_tables", 0, "block_tables"),
        ("prefill", "attention_mask", 0, "attention_mask"),
    ],
)
def test_an_input_of_another_size_is_refused_by_name(phase, name, axis, mention, change):
    call = target(phase).call()
    if name == "attention_mask":
        call.tensors[name] = torch.zeros(4, 4)
    wrong = call.tensors[name] = _resized(call.tensors[name], axis, change)
    mentions = (mention,) if name == "input_ids" else (mention, shape_text(wrong))
    target(phase).check_refused(call, ValueError, mentions)
