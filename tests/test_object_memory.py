"""What the object keeps alive, what it does not, and which rows of the cache a step touches."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from model_objects import (
    PROMPTS,
    SHAPE,
    Prefill,
    Target,
    both_phases,
    make_runner,
    new,
    new_caches,
    parameter_text,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- what the object keeps -------------------------------------------------------------------------


def test_weights_and_caches_live_as_long_as_the_object_needs_them():
    runner = make_runner()
    step = runner.prefill_inputs(PROMPTS)
    expected = runner.encoder.execute(*step)[0]

    made = new()
    made.set_param(parameter_text())
    # clone(): nobody else may hold the memory.
    weights = [weight.clone() for weight in weights_of(made)]
    caches = [tensor.clone() for tensor in runner.caches]
    made.set_weight(weights)
    made.set_kv_cache(caches[0::2], caches[1::2])
    sizes = [tensor.shape for tensor in (*weights, *caches)]
    del weights, caches
    gc.collect()
    junk = [torch.full(size, 1e9) for size in sizes for _ in range(3)]
    assert torch.equal(made.execute(*step)[0], expected)
    del junk


def _watched(shape: tuple[int, ...]) -> tuple[torch.Tensor, weakref.ref]:
    """A tensor and a weak reference to the memory under it."""
    numpy = pytest.importorskip("numpy")
    array = numpy.zeros(shape, dtype=numpy.float32)
    return torch.from_numpy(array), weakref.ref(array)


@pytest.mark.parametrize("how", ["set_kv_cache again", "set_param again", "the object dies"])
def test_caches_are_given_back_when_they_are_no_longer_needed(how):
    prefill = Prefill()
    tensor, memory = _watched((8, 16, SHAPE.kv_heads, SHAPE.head_size))
    prefill.made.set_kv_cache([tensor, *new_caches()[1:]], new_caches())
    del tensor
    gc.collect()
    assert memory() is not None, "the object must hold its caches"
    if how == "set_kv_cache again":
        prefill.made.set_kv_cache(new_caches(), new_caches())
    elif how == "set_param again":
        prefill.made.set_param(parameter_text())
    else:
        prefill.made = None
    gc.collect()
    assert memory() is None


@pytest.mark.parametrize("how", ["set_weight again", "set_param again", "the object dies"])
def test_weights_are_given_back_when_they_are_no_longer_needed(how):
    prefill = Prefill()
    weights = weights_of(prefill.made)
    watched, memory = _watched(tuple(weights[-1].shape))
    prefill.made.set_weight([*weights[:-1], watched])
    del watched
    assert torch.equal(prefill.logits(), torch.zeros(5, SHAPE.vocab))
    if how == "set_weight again":
        prefill.made.set_weight(weights)
    elif how == "set_param again":
        prefill.made.set_param(parameter_text())
    else:
        prefill.made = None
    gc.collect()
    assert memory() is None


STRIDED = {
    "transposed": lambda weight: weight.t().contiguous().t() if weight.dim() == 2 else weight,
    "with gaps": lambda weight: torch.stack([weight, weight + 1], dim=-1)[..., 0],
    "a part of a larger tensor": lambda weight: torch.cat([weight + 1, weight], dim=-1)[..., weight.shape[-1] :],
}


@pytest.mark.parametrize("kind", STRIDED)
def test_weights_that_are_not_contiguous_give_the_same_logits(kind):
    prefill = Prefill()
    before = prefill.logits()
    strided = [STRIDED[kind](weight) for weight in weights_of(prefill.made)]
    assert not all(weight.is_contiguous() for weight in strided)
    prefill.made.set_weight(strided)
    sizes = [weight.shape for weight in strided]
    del strided
    gc.collect()
    junk = [torch.full(size, 1e9) for size in sizes for _ in range(3)]
    assert torch.equal(prefill.logits(), before)
    del junk


def test_weights_that_require_gradients_record_nothing():
    prefill = Prefill()
    before = prefill.logits()
    prefill.made.set_weight([torch.nn.Parameter(weight) for weight in weights_of(prefill.made)])
    after = prefill.logits()
    assert torch.equal(before, after)
    assert not after.requires_grad
    with torch.inference_mode():
        assert torch.equal(prefill.logits(), before)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "a default device": lambda: torch.device("meta"),
    "gradients": torch.enable_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_the_state_of_torch_around_a_call_changes_nothing(surroundings):
    runner = make_runner()
    step = runner.prefill_inputs([list(range(40)), [1, 2, 3]])
    expected = runner.encoder.execute(*step)[0]
    with SURROUNDINGS[surroundings]():
        logits = runner.encoder.execute(*step)[0]
    assert (logits.dtype, logits.device) == (expected.dtype, expected.device)
    assert torch.equal(logits, expected)


# ---- the cache -------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_cache_rows_that_were_never_written_are_never_read(poison):
    aim = Target("decode", "2024")
    assert not aim.runner.caches[0].isnan().all(), "the caches must have rows of both kinds"
    for tensor in aim.runner.caches:
        unwritten = tensor.isnan()
        assert unwritten.any()
        tensor[unwritten] = poison
    (logits,) = aim.made.execute(*aim.call().arguments())
    assert torch.equal(logits, aim.expected)


@both_phases
def test_a_step_writes_the_rows_of_its_slots_and_no_others(phase):
    aim = Target(phase, "2024")
    call = aim.call()
    aim.made.execute(*call.arguments())
    slots = call.tensors["slots"].long()
    for tensor, before in zip(aim.runner.caches, aim.caches_before, strict=True):
        rows = tensor.view(-1, SHAPE.kv_heads * SHAPE.head_size)
        old = before.view(-1, SHAPE.kv_heads * SHAPE.head_size)
        assert torch.isfinite(rows[slots]).all()
        others = torch.ones(len(rows), dtype=torch.bool)
        others[slots] = False
        assert torch.equal(rows[others].view(torch.int32), old[others].view(torch.int32))
