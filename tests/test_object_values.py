"""Inputs and parameters of a step with values that cannot be are refused by name, and leave no trace."""

from __future__ import annotations

import json

import pytest
import torch
from model_objects import (
    INPUT_NAMES,
    PHASES,
    READ_INPUTS,
    SHAPE,
    bits,
    both_generations,
    both_phases,
    new_caches,
    same_bits,
    target,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

OUT_OF_RANGE = [
    ("prefill", "input_ids", -1),
    ("prefill", "input_ids", SHAPE.vocab),
    ("prefill", "input_ids", 2**40),
    ("prefill", "position_ids", -1),
    ("prefill", "position_ids", SHAPE.max_positions),
    ("prefill", "slots", -2),
    ("prefill", "slots", 64 * 16),
    ("prefill", "logits_indices", -1),
    ("prefill", "logits_indices", 5),
    ("prefill", "logits_indices", -(2**63)),
    ("decode", "input_ids", -1),
    ("decode", "input_ids", SHAPE.vocab),
    ("decode", "position_ids", -(2**63)),
    ("decode", "position_ids", SHAPE.max_positions),
    ("decode", "slots", -2),
    ("decode", "slots", -(2**31)),
    ("decode", "slots", 64 * 16),
    ("decode", "block_tables", -1),
    ("decode", "block_tables", 64),
    ("decode", "block_tables", 2**31 - 1),
]


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize(("phase", "name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_name(phase, name, value, place):
    call = target(phase).call()
    wrong = call.tensors[name] = call.tensors[name].clone()
    wrong.view(-1)[place] = value
    target(phase).check_refused(call, ValueError, (name, str(value)))


@pytest.mark.parametrize(("phase", "name"), [(phase, name) for phase in PHASES for name in ["slots"]])
def test_the_slot_minus_one_is_not_out_of_range(phase, name):
    call = target(phase).call()
    call.tensors[name] = torch.full_like(call.tensors[name], -1)
    aim = target(phase)
    aim.made.execute(*call.arguments())
    assert same_bits(aim.runner.caches, bits(aim.caches_before))


def test_entries_of_the_block_tables_beyond_the_context_are_never_read():
    aim = target("decode")
    call = aim.call()
    used = call.tensors["block_tables"]
    beyond = torch.tensor([[-5, 2**31 - 1]] * used.shape[0], dtype=torch.int32)
    call.tensors["block_tables"] = torch.cat([used, beyond], dim=1)
    assert torch.equal(aim.run(call), aim.expected)


def test_a_context_that_does_not_fit_its_block_table_is_refused():
    aim = target("decode")
    call = aim.call()
    capacity = call.tensors["block_tables"].shape[1] * aim.runner.block_size
    call.parameters["seqLen"][1] = capacity + 1
    call.tensors["seq_len"] = torch.tensor(call.parameters["seqLen"], dtype=torch.int32)
    aim.check_refused(call, ValueError, ("block_tables", str(capacity + 1)))


@both_phases
@pytest.mark.parametrize(
    ("lengths", "mention"),
    [
        pytest.param(None, "seqLen", id="missing"),
        pytest.param("3,2", "seqLen", id="a string"),
        pytest.param({}, "seqLen", id="an object"),
        pytest.param(5, "seqLen", id="a number"),
        pytest.param([], "seq_len", id="empty"),
        pytest.param([3], "seq_len", id="too few"),
        pytest.param([3, 2, 1], "seq_len", id="too many"),
        pytest.param([3, 0], "seqLen", id="zero"),
        pytest.param([5, 0], "seqLen", id="zero with the right sum"),
        pytest.param([3, -2], "seqLen", id="negative"),
        pytest.param([3, 2.0], "seqLen", id="a float"),
        pytest.param([3, True], "seqLen", id="a boolean"),
        pytest.param([3, "2"], "seqLen", id="a string inside"),
        pytest.param([3, None], "seqLen", id="null inside"),
        pytest.param([3, [2]], "seqLen", id="a list inside"),
        pytest.param([3, 2**31], "seqLen", id="beyond int32"),
        pytest.param([3, 2**63], "seqLen", id="beyond int64"),
        pytest.param([3, 2**32 + 2], "seqLen", id="right modulo 2^32"),
        pytest.param([2, 3], "seq_len", id="unlike the tensor"),
        pytest.param([1, 4], "seq_len", id="right sum, unlike the tensor"),
    ],
)
def test_a_wrong_seqLen_is_refused(phase, lengths, mention):
    call = target(phase).call()
    if phase == "decode" and isinstance(lengths, list):
        longer = [n + 1 if type(n) is int and 0 < n < 2**31 - 1 else n for n in lengths]
        lengths = longer
    call.parameters = {} if lengths is None else {"seqLen": lengths}
    target(phase).check_refused(call, ValueError, (mention,))


@both_phases
def test_a_length_of_zero_is_refused_even_if_tensor_and_parameters_agree(phase):
    call = target(phase).call()
    call.parameters = {"seqLen": [sum(call.parameters["seqLen"]), 0]}
    call.tensors["seq_len"] = torch.tensor(call.parameters["seqLen"], dtype=torch.int32)
    target(phase).check_refused(call, ValueError, ("seqLen", "0"))


def test_lengths_that_do_not_add_up_to_the_tokens_are_refused_in_prefill():
    call = target("prefill").call()
    call.parameters = {"seqLen": [3, 3]}
    call.tensors["seq_len"] = torch.tensor([3, 3], dtype=torch.int32)
    target("prefill").check_refused(call, ValueError, ("seqLen", "input_ids", "5", "6"))


def test_a_decode_step_with_more_tokens_than_sequences_is_refused():
    call = target("decode").call()
    for name in ("input_ids", "position_ids", "slots"):
        call.tensors[name] = call.tensors[name].repeat(2)
    target("decode").check_refused(call, ValueError, ("seqLen", "input_ids"))


@both_phases
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "nonsense",
        "null",
        "5",
        "[]",
        '["seqLen"]',
        '{"seqLen": [3, 2]',
        '{"seqLen": [3, 2]} x',
        "{'seqLen': [3, 2]}",
        '{"seqLen": [3, 2], }',
        '{"seqLen": [3, NaN]}',
        '{"seqLen": [3, 2], "x": "' + "y" * 200_001 + '"}',
        "[" * 100_000,
        '{"x":' * 10_000,
    ],
    ids=lambda text: repr(text[:24]),
)
def test_text_that_is_not_a_JSON_object_is_refused(phase, text):
    call = target(phase).call()
    call.parameters = text
    target(phase).check_refused(call, ValueError, ("parameter of execute",))


@both_phases
def test_chunked_prefill_is_refused_as_not_built(phase):
    call = target(phase).call()
    call.parameters["qLen"] = [1, 1]
    target(phase).check_refused(call, NotImplementedError, ("qLen",))


@both_phases
@both_generations
def test_a_list_in_the_order_of_the_other_generation_is_told_with_the_name_to_use(phase, generation):
    other = {"2024": "current", "current": "2024"}[generation]
    call = target(phase, generation).call()
    call.tensors = {name: call.tensors[name] for name in INPUT_NAMES[other]}
    names = {"2024": "qwen_QwenDecoderModel", "current": "qwen_DecoderModel"}
    target(phase, generation).check_refused(call, ValueError, ("seq_len", "order", names[generation]))
    # The named model takes that very list.
    taker = target(phase, other)
    assert torch.equal(taker.run(call), taker.expected)


DOORS = {
    "weight": lambda aim, spoil: aim.made.set_weight([spoil(weights_of(aim.made)[0]), *weights_of(aim.made)[1:]]),
    "cache": lambda aim, spoil: aim.made.set_kv_cache(new_caches(), [spoil(new_caches()[0]), *new_caches()[1:]]),
    "input": lambda aim, spoil: aim.made.execute([spoil(aim.inputs[0]), *aim.inputs[1:]], json.dumps(aim.parameters)),
    "output": lambda aim, spoil: aim.made.execute_out(
        aim.inputs, [spoil(torch.empty_like(aim.expected))], json.dumps(aim.parameters)
    ),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("spoil", "given"),
    [
        pytest.param(lambda t: t.double(), "float64", id="float64"),
        pytest.param(lambda t: t.to("meta"), "meta", id="meta"),
    ],
)
def test_the_message_names_a_dtype_or_device_that_no_kernel_knows(door, spoil, given):
    with pytest.raises(ValueError, match="must") as error:
        DOORS[door](target("prefill"), spoil)
    assert given in str(error.value).lower()


def test_hundreds_of_bad_calls_leave_no_trace():
    aim = target("prefill")
    plans = aim.made.counters()["plans_built"]
    for round_number in range(300):
        call = aim.call()
        name = list(READ_INPUTS["prefill"])[round_number % len(READ_INPUTS["prefill"])]
        call.tensors[name] = call.tensors[name].to(torch.float64)
        with pytest.raises(ValueError, match=name):
            aim.made.execute(*call.arguments())
    assert torch.equal(aim.run(), aim.expected)
    assert aim.made.counters()["plans_built"] == plans
