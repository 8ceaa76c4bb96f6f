"""init_kvcache: which tensors reach the objects, and when they are set again."""

from __future__ import annotations

import weakref

import pytest
import torch
from flash_callers import TOLERANCE, Caller, new_caches
from reference import relative_error

from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")


class Counter:
    """Stands before a step object and keeps the caches that it is given."""

    def __init__(self, operation: torch.ScriptObject) -> None:
        self.operation = operation
        self.calls: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []

    def set_kv_cache(self, keys: list[torch.Tensor], values: list[torch.Tensor]) -> int:
        self.calls.append((keys, values))
        return self.operation.set_kv_cache(keys, values)

    def __getattr__(self, name: str) -> object:
        return getattr(self.operation, name)


@pytest.fixture
def counted(model) -> FlashQwen2ForCausalLM:
    model.init_ascend_weight()
    model.acl_encoder_operation = Counter(model.acl_encoder_operation)
    model.acl_decoder_operation = Counter(model.acl_decoder_operation)
    return model


def times_set(model: FlashQwen2ForCausalLM) -> int:
    prefill, decode = model.acl_encoder_operation.calls, model.acl_decoder_operation.calls
    assert len(prefill) == len(decode)
    return len(prefill)


def test_keys_and_values_of_every_layer_reach_both_objects(counted):
    caches = new_caches()
    counted.init_kvcache(caches)
    for operation in (counted.acl_encoder_operation, counted.acl_decoder_operation):
        ((keys, values),) = operation.calls
        assert [id(key) for key in keys] == [id(key) for key, _ in caches]
        assert [id(value) for value in values] == [id(value) for _, value in caches]


def test_the_same_tensors_are_not_set_again_whatever_holds_them(counted):
    caches = new_caches()
    counted.init_kvcache(caches)
    for same in (caches, list(caches), tuple(caches), [list(pair) for pair in caches]):
        counted.init_kvcache(same)
    caller = Caller(caches)
    counted.forward(*caller.prefill())
    counted.forward(*caller.decode([1, 2, 3, 4]))
    assert times_set(counted) == 1


@pytest.mark.parametrize("replaced", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
def test_one_new_tensor_of_the_same_shape_is_enough_to_set_them_again(counted, replaced):
    caches = new_caches()
    counted.init_kvcache(caches)
    layer, side = replaced
    pair = list(caches[layer])
    pair[side] = pair[side].clone()
    changed = [tuple(pair) if n == layer else old for n, old in enumerate(caches)]
    counted.init_kvcache(changed)
    assert times_set(counted) == 2
    counted.init_kvcache(changed)
    assert times_set(counted) == 2
    counted.init_kvcache(caches)
    assert times_set(counted) == 3


def test_new_tensors_at_the_ids_of_old_ones_are_set_too(counted):
    caches = new_caches()
    counted.init_kvcache(caches)
    alive = weakref.ref(caches[0][0])
    for times in range(2, 12):
        del caches
        # The tensors that the objects hold are kept, so that nothing new can come to lie at their ids.
        assert alive() is not None
        caches = new_caches()
        counted.init_kvcache(caches)
        assert times_set(counted) == times
        alive = weakref.ref(caches[0][0])


def test_new_caches_are_read_and_written_from_the_next_step_on(model, reference):
    first, second = Caller(new_caches()), Caller(new_caches(), [[8, 8], [7, 6, 5], [1] * 30, [2]])
    model.forward(*first.prefill())
    model.forward(*second.prefill())
    for caller in (first, second, first):
        logits = model.forward(*caller.decode([11, 12, 13, 14]))
        assert relative_error(logits, caller.last_rows(reference)) < TOLERANCE


def test_caches_that_do_not_fit_are_refused_every_time_and_the_old_ones_stay(counted, reference):
    caller = Caller(new_caches())
    counted.forward(*caller.prefill())
    wrong = [(key[..., :8].contiguous(), value) for key, value in caller.caches]
    for _ in range(2):
        with pytest.raises(ValueError, match="cache"):
            counted.init_kvcache(wrong)
    logits = counted.forward(*caller.decode([1, 2, 3, 4]))
    assert relative_error(logits, caller.last_rows(reference)) < TOLERANCE
