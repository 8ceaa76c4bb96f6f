"""The helpers of a step, with the names and the meaning that callers of the Ascend front ends know."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from flash_callers import BLOCK_SIZE, BLOCKS, SHAPE, TOLERANCE, Caller, new_caches
from reference import relative_error
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from modeltorch.configuration import rope_tables
from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM
from modeltorch.weight_list import _put_side_by_side

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- forward ---------------------------------------------------------------------------------------


def test_prefill_without_indices_gives_the_logits_of_every_token(model, reference):
    caller = Caller(new_caches())
    logits = model.forward(*caller.prefill())
    assert relative_error(logits, caller.every_row(reference)) < TOLERANCE
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("rows", [[39, 40, 56, 59], [59, 0, 0, 17], []], ids=["last", "any order", "none"])
def test_prefill_with_indices_gives_those_rows(model, reference, rows, dtype):
    caller = Caller(new_caches())
    logits = model.forward(*caller.prefill(), lm_head_indices=torch.tensor(rows, dtype=dtype))
    expected = caller.every_row(reference)[rows]
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_decode_steps_equal_transformers_over_block_borders_in_any_order(model, reference):
    caller = Caller(new_caches())
    model.forward(*caller.prefill())
    for step in range(10):  # the sequence of 40 crosses into its block 3, the one of 16 into its block 1
        logits = model.forward(*caller.decode([step + 1, 2 * step, 150 - step, 7]))
        assert relative_error(logits, caller.last_rows(reference)) < TOLERANCE


def test_decode_ignores_the_indices(model, reference):
    caller = Caller(new_caches())
    model.forward(*caller.prefill())
    logits = model.forward(*caller.decode([1, 2, 3, 4]), lm_head_indices=torch.tensor([0]))
    assert relative_error(logits, caller.last_rows(reference)) < TOLERANCE


def test_only_the_slots_of_the_tokens_are_written(model):
    caller = Caller(new_caches())
    arguments = caller.prefill()
    model.forward(*arguments)
    rows = torch.zeros(BLOCKS * BLOCK_SIZE, dtype=torch.bool)
    rows[arguments[5]] = True
    for cache in (tensor for pair in caller.caches for tensor in pair):
        finite = cache.isfinite().view(len(rows), -1)
        assert finite[rows].all()
        assert not finite[~rows].any()


def test_the_first_forward_sets_the_weights_and_no_other_does(model, monkeypatch):
    calls = []
    original = model.init_ascend_weight
    monkeypatch.setattr(model, "init_ascend_weight", lambda: (calls.append(None), original()))
    assert model.ascend_weight == []
    caller = Caller(new_caches())
    model.forward(*caller.prefill())
    model.forward(*caller.decode([1, 2, 3, 4]))
    assert len(calls) == 1


def test_the_model_itself_can_be_called(model):
    caller = Caller(new_caches())
    assert torch.equal(model(*caller.prefill()), model.forward(*caller.prefill()))


IDS, POSITIONS, TABLES, SLOTS_OF, LENGTHS = 0, 1, 4, 5, 6


WRONG = {
    "ids": (IDS, lambda ids: ids + SHAPE.vocab, "input_ids"),
    "ids of another type": (IDS, lambda ids: ids.float(), "input_ids"),
    "positions": (POSITIONS, lambda positions: positions - 50, "position"),
    "block tables": (TABLES, lambda tables: tables + BLOCKS, "block_tables"),
    "slots": (SLOTS_OF, lambda slots: slots + BLOCKS * BLOCK_SIZE, "slots"),
    "lengths": (LENGTHS, lambda lengths: lengths + 1000, "10[0-9][0-9] tokens"),
}


@pytest.mark.parametrize(("place", "spoil", "named"), WRONG.values(), ids=WRONG)
def test_a_step_that_is_refused_leaves_the_model_and_its_caches_as_they_were(model, reference, place, spoil, named):
    caller = Caller(new_caches())
    model.forward(*caller.prefill())
    arguments = caller.decode([1, 2, 3, 4])
    with pytest.raises(ValueError, match=named):
        model.forward(*[spoil(it) if n == place else it for n, it in enumerate(arguments)])
    assert relative_error(model.forward(*arguments), caller.last_rows(reference)) < TOLERANCE


FEATURES = {
    "q_lens": [1],
    "attn_mask": torch.ones(2, 2),
    "spec_mask": torch.ones(2, 2),
    "adapter_ids": ["a"],
    "anything": 0,
}


@pytest.mark.parametrize(("name", "value"), FEATURES.items(), ids=FEATURES)
def test_a_keyword_that_asks_for_a_feature_that_is_not_built_is_refused_by_name(model, name, value):
    caller = Caller(new_caches())
    with pytest.raises(NotImplementedError, match=name):
        model.forward(*caller.prefill(), **{name: value})
    assert all(tensor.isnan().all() for pair in caller.caches for tensor in pair)
    assert model.forward(*caller.prefill(), **{name: None}).shape == (60, SHAPE.vocab)


# ---- init_ascend_weight and get_weights ------------------------------------------------------------


SLOTS = {
    "input_layernorm.weight": 0,
    "self_attn.q_proj.weight": 4,
    "self_attn.q_proj.bias": 5,
    "self_attn.k_proj.weight": 10,
    "self_attn.k_proj.bias": 11,
    "self_attn.v_proj.weight": 16,
    "self_attn.v_proj.bias": 17,
    "self_attn.o_proj.weight": 22,
    "post_attention_layernorm.weight": 28,
    "mlp.gate_proj.weight": 32,
    "mlp.up_proj.weight": 38,
    "mlp.down_proj.weight": 44,
}


SLOTS_PER_LAYER = 50


def test_the_weight_list_has_fifty_slots_a_layer_and_holds_the_given_tensors(reference):
    given = reference.state_dict()
    model = FlashQwen2ForCausalLM(reference.config, given, dtype="float32")
    weights = model.get_weights()
    expected = {0: "model.embed_tokens.weight"}
    for layer in range(SHAPE.layers):
        for name, slot in SLOTS.items():
            expected[1 + SLOTS_PER_LAYER * layer + slot] = f"model.layers.{layer}.{name}"
    end = 1 + SLOTS_PER_LAYER * SHAPE.layers
    expected |= {end: "model.norm.weight", end + 1: "lm_head.weight"}
    assert len(weights) == end + 2
    assert len(expected) == len(given)
    for slot, weight in enumerate(weights):
        if slot in expected:
            assert weight is given[expected[slot]]
        else:
            assert weight.numel() == 1


# ---- prepare_inputs_for_ascend and execute_ascend_operator -----------------------------------------


INT32, INT64, FLOAT = torch.int32, torch.int64, torch.float32


TABLE = (SHAPE.max_positions, SHAPE.head_size)


INPUTS = {
    True: [
        ("input_ids", INT64, (60,)),
        ("position_ids", INT64, (60,)),
        ("cos", FLOAT, TABLE),
        ("sin", FLOAT, TABLE),
        ("mask", FLOAT, (1,)),
        ("block_tables", INT32, (4, 4)),
        ("slots", INT32, (60,)),
        ("kv_cache_idx", FLOAT, (1,)),
        ("token_offset", FLOAT, (1,)),
        ("input_lengths", INT32, (4,)),
        ("lm_head_indices", INT64, (60,)),
        ("place_holder", FLOAT, (1,)),
    ],
    False: [
        ("input_ids", INT64, (4,)),
        ("position_ids", INT64, (4,)),
        ("cos", FLOAT, TABLE),
        ("sin", FLOAT, TABLE),
        ("mask", FLOAT, (1,)),
        ("block_tables", INT32, (4, 4)),
        ("slots", INT32, (4,)),
        ("kv_cache_idx", FLOAT, (1,)),
        ("token_offset", FLOAT, (1,)),
        ("input_lengths", INT32, (4,)),
        ("lm_head_indices", FLOAT, (1,)),
        ("place_holder", FLOAT, (1,)),
    ],
}


@pytest.mark.parametrize("given", [torch.int32, torch.int64], ids=lambda dtype: f"given-{dtype}")
@pytest.mark.parametrize("is_prefill", [True, False], ids=["prefill", "decode"])
def test_a_step_has_twelve_inputs_in_the_order_of_2024(model, is_prefill, given):
    caller = Caller(new_caches())
    arguments = caller.prefill() if is_prefill else caller.decode([1, 2, 3, 4])
    cast = [
        argument.to(given) if isinstance(argument, torch.Tensor) and n > 0 else argument
        for n, argument in enumerate(arguments)
    ]
    inputs, parameters = model.prepare_inputs_for_ascend(*cast)
    table = INPUTS[is_prefill]
    names = [name for name, _, _ in table]
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in inputs] == [row[1:] for row in table]
    by_name = dict(zip(names, inputs, strict=True))
    ids, positions, _, _, tables, slots, lengths, _ = arguments
    for name, expected in {
        "input_ids": ids,
        "position_ids": positions,
        "block_tables": tables,
        "slots": slots,
        "input_lengths": lengths,
    }.items():
        assert by_name[name].tolist() == expected.tolist()
    if is_prefill:
        assert by_name["lm_head_indices"].tolist() == list(range(60))
    assert json.loads(parameters) == {"seqLen": lengths.tolist()}


def test_indices_are_handed_over_as_int64(model):
    rows = torch.tensor([5, 1], dtype=torch.int32)
    inputs, _ = model.prepare_inputs_for_ascend(*Caller(new_caches()).prefill(), lm_head_indices=rows)
    assert (inputs[10].dtype, inputs[10].tolist()) == (torch.int64, [5, 1])


def test_floating_point_inputs_have_the_models_dtype(reference):
    model = FlashQwen2ForCausalLM(reference.config, reference.state_dict(), dtype="bfloat16")
    inputs, _ = model.prepare_inputs_for_ascend(*Caller(new_caches()).prefill())
    assert {inputs[n].dtype for n in (2, 3, 4, 7, 8, 11)} == {torch.bfloat16}


def test_a_prepared_step_runs_on_the_object_of_its_phase(model, reference):
    model.init_ascend_weight()
    caller = Caller(new_caches())
    model.init_kvcache(caller.caches)
    prefill = model.execute_ascend_operator(*model.prepare_inputs_for_ascend(*caller.prefill()), True)
    assert relative_error(prefill, caller.every_row(reference)) < TOLERANCE
    prepared = model.prepare_inputs_for_ascend(*caller.decode([1, 2, 3, 4]))
    decode = model.execute_ascend_operator(*prepared, False)
    assert relative_error(decode, caller.last_rows(reference)) < TOLERANCE


def test_an_object_is_settled_before_the_other_goes_on_over_its_cache(model):
    told: list[str] = []

    class Told:
        def __init__(self, operation: torch.ScriptObject, name: str) -> None:
            self.operation, self.name = operation, name

        def execute(self, *arguments: object) -> list[torch.Tensor]:
            told.append(f"{self.name} runs")
            return self.operation.execute(*arguments)

        def settle(self) -> int:
            told.append(f"{self.name} is settled")
            return self.operation.settle()

    model.init_ascend_weight()
    caller = Caller(new_caches())
    model.init_kvcache(caller.caches)
    model.acl_encoder_operation = Told(model.acl_encoder_operation, "prefill")
    model.acl_decoder_operation = Told(model.acl_decoder_operation, "decode")
    model.settle()
    model.forward(*caller.prefill())
    model.forward(*caller.decode([1, 2, 3, 4]))
    model.forward(*caller.decode([1, 2, 3, 4]))
    model.settle()
    model.forward(*Caller(caller.caches).prefill())
    assert told == [
        "prefill runs",
        "prefill is settled",
        "decode runs",
        "decode runs",
        "decode is settled",
        "decode is settled",
        "prefill runs",
    ]


# ---- rope ------------------------------------------------------------------------------------------


NEW = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}


ROPE = {
    "nothing": ({}, {}),
    "new default": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},) * 2,
    "new linear": ({"rope_parameters": NEW},) * 2,
    "old theta": (
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "old linear, type": (
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": NEW},
    ),
    "old linear, rope_type": (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": NEW},
    ),
}


@pytest.mark.parametrize(("attributes", "transformers_says"), ROPE.values(), ids=ROPE)
def test_the_rope_tables_of_any_configuration_equal_transformers(attributes, transformers_says):
    positions = 300
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": positions}
    cos, sin = rope_tables(SimpleNamespace(**sizes, **attributes), 16, torch.float32)
    rotary = Qwen2RotaryEmbedding(Qwen2Config(**sizes, **transformers_says))
    theirs = rotary(torch.zeros(1), torch.arange(positions).unsqueeze(0))
    assert cos.shape == sin.shape == (positions, 16)
    torch.testing.assert_close(cos, theirs[0][0], rtol=0, atol=5e-5)
    torch.testing.assert_close(sin, theirs[1][0], rtol=0, atol=5e-5)


# ---- warming up -------------------------------------------------------------------------------------


def test_warming_up_makes_the_plans_of_later_steps_and_leaves_the_cache_alone(model):
    model.warm_up(batch_sizes=[1, 3], prompt_lengths=[7])
    for key, value in model.cache.pairs:
        key.fill_(5.0)
        value.fill_(6.0)
    objects = (model.acl_encoder_operation, model.acl_decoder_operation)
    for _ in range(2):
        assert [made.counters()["plans_built"] for made in objects] == [1, 2]
        model.warm_up(batch_sizes=[1, 3], prompt_lengths=[7])
    assert all((key == 5.0).all() and (value == 6.0).all() for key, value in model.cache.pairs)
    with pytest.raises(ValueError, match="at least 1"):
        model.warm_up(batch_sizes=[0])


@pytest.mark.parametrize("has_bias", [True, False])
def test_parts_of_a_linear_can_be_laid_behind_each_other(has_bias):
    names = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"]
    rows = dict(zip(names, (8, 4, 4, 6, 10, 10, 6), strict=True))
    slots: dict[str, int] = {}
    weights: list[torch.Tensor] = []
    for layer in range(2):
        for name in names:
            slots[f"layers.{layer}.{name}.weight"] = len(weights)
            weights.append(torch.randn(rows[name], 6))
            if has_bias and name in ("attn.q", "attn.k", "attn.v"):
                slots[f"layers.{layer}.{name}.bias"] = len(weights)
                weights.append(torch.randn(rows[name]))
    before = [weight.clone() for weight in weights]
    _put_side_by_side(weights, slots)
    assert all(torch.equal(new, old) for new, old in zip(weights, before, strict=True))
    for layer in range(2):
        for group in (names[:3], names[4:6]):
            for kind in ("weight", "bias") if has_bias and group[0] == "attn.q" else ("weight",):
                parts = [weights[slots[f"layers.{layer}.{name}.{kind}"]] for name in group]
                for part, following in itertools.pairwise(parts):
                    assert part.data_ptr() + part.nbytes == following.data_ptr()
