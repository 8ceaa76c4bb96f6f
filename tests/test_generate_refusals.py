"""What generate refuses before anything runs, what a failure costs, and what a prompt may be."""

from __future__ import annotations

import math

import pytest
import torch
from watched_models import GOOD, SHAPE, runner, watched

from modeltorch.paged_cache import PagedCache

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- refusals and failures -------------------------------------------------------------------------


REFUSED = {
    "an empty prompt": ([GOOD, []], {}, "at least one token"),
    "an id at the size of the vocabulary": ([GOOD, [1, SHAPE.vocab]], {}, str(SHAPE.vocab)),
    "a huge id": ([GOOD, [2**70]], {}, str(2**70)),
    "a negative id": ([GOOD, [-1]], {}, "-1"),
    "an id that is no whole number": ([GOOD, [1, 2.5]], {}, "2.5"),
    "an id that is text": ([GOOD, ["1"]], {}, "'1'"),
    "an id that is nothing": ([GOOD, [None]], {}, "None"),
    "a matrix as a prompt": ([torch.ones(2, 2, dtype=torch.int64)], {}, "token"),
    "token ids that are not in a list": (GOOD, {}, "list"),
    "bytes": (b"1+1=", {}, "bytes"),
    "bytes in a list": ([b"1+1="], {}, "bytes"),
    "nothing": (None, {}, "None"),
    "no new tokens": ([GOOD], {"max_new_tokens": 0}, "max_new_tokens"),
    "fewer than none": ([GOOD], {"max_new_tokens": -1}, "max_new_tokens"),
    "a fraction of tokens": ([GOOD], {"max_new_tokens": 1.5}, "max_new_tokens"),
    "a count that is text": ([GOOD], {"max_new_tokens": "4"}, "max_new_tokens"),
    "a negative temperature": ([GOOD], {"temperature": -0.5}, "temperature"),
    "a temperature that is no number": ([GOOD], {"temperature": math.nan}, "temperature"),
    "an infinite temperature": ([GOOD], {"temperature": math.inf}, "temperature"),
    "a temperature that is text": ([GOOD], {"temperature": "1"}, "temperature"),
    "a negative top_k": ([GOOD], {"top_k": -1}, "top_k"),
    "a fraction of top_k": ([GOOD], {"top_k": 1.5}, "top_k"),
    "a top_p of nothing": ([GOOD], {"top_p": 0.0}, "top_p"),
    "a top_p above 1": ([GOOD], {"top_p": 1.1}, "top_p"),
    "a top_p that is no number": ([GOOD], {"top_p": math.nan}, "top_p"),
    "a negative seed": ([GOOD], {"seed": -1}, "seed"),
    "a seed that is text": ([GOOD], {"seed": "1"}, "seed"),
    "more positions than the model has": ([GOOD, [5] * 500], {"max_new_tokens": 13}, "512 positions"),
    "a prompt that fills every position": ([GOOD, [5] * 512], {}, "512 positions"),
    "more than the cache ever holds": ([GOOD, [5] * 100], {"max_new_tokens": 29}, "num_blocks"),
}


@pytest.mark.parametrize(("prompts", "options", "words"), REFUSED.values(), ids=REFUSED)
def test_what_can_never_run_is_refused_before_anything_runs(reference, monkeypatch, prompts, options, words):
    model = runner(reference, num_blocks=8)
    free = model.cache.free_blocks
    steps = watched(model, monkeypatch)
    with pytest.raises((ValueError, TypeError)) as caught:
        model.generate(prompts, **{"max_new_tokens": 3, **options})
    assert words in str(caught.value)
    assert steps == []
    assert model.cache.free_blocks == free == 8


def test_a_request_that_just_fits_the_cache_and_the_positions_runs(reference):
    assert len(runner(reference).generate([[5] * 100], max_new_tokens=28)[0].token_ids) == 28
    roomy = runner(reference, num_blocks=32)
    assert len(roomy.generate([[5] * 500], max_new_tokens=12)[0].token_ids) == 12


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [1, 2, 4, 7])
def test_a_failure_in_the_middle_of_a_run_loses_no_block(reference, monkeypatch, at, kind):
    model = runner(reference, num_blocks=3)
    prompts = [[n, n + 1] for n in range(7)]
    expected = model.generate(prompts, max_new_tokens=4)
    original, calls = model.forward, []

    def failing(*arguments, **keywords):
        calls.append(None)
        if len(calls) == at:
            raise kind
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", failing)
        with pytest.raises(kind):
            model.generate(prompts, max_new_tokens=4)
    assert len(calls) == at
    assert model.cache.free_blocks == 3
    # No block is free twice either: two requests would then overwrite each other.
    assert model.generate(prompts, max_new_tokens=4) == expected


class FailsLate:
    """A step object whose n-th step fails after its call has returned, as on a device with a queue."""

    def __init__(self, operation: torch.ScriptObject, at: int) -> None:
        self.operation, self.at, self.steps, self.told = operation, at, 0, False

    def execute(self, *arguments: object) -> list[torch.Tensor]:
        self.steps += 1
        return self.operation.execute(*arguments)

    def settle(self) -> int:
        if self.steps == self.at and not self.told:
            self.told = True
            raise RuntimeError("an earlier step failed")
        return self.operation.settle()

    def __getattr__(self, name: str) -> object:
        return getattr(self.operation, name)


@pytest.mark.parametrize(("phase", "at"), [("encoder", 1), ("encoder", 3), ("decoder", 1), ("decoder", 2)])
def test_a_step_that_fails_after_its_call_gives_no_text(reference, phase, at):
    """The other object works on over the same cache: nothing of its may be taken for an answer."""
    model = runner(reference, num_blocks=3)
    prompts = [[n, n + 1] for n in range(7)]
    expected = model.generate(prompts, max_new_tokens=4)
    name = f"acl_{phase}_operation"
    failing = FailsLate(getattr(model, name), at)
    setattr(model, name, failing)
    with pytest.raises(RuntimeError, match="an earlier step failed"):
        model.generate(prompts, max_new_tokens=4)
    assert failing.steps == at
    assert model.cache.free_blocks == 3
    assert model.generate(prompts, max_new_tokens=4) == expected


def test_logits_of_a_step_that_fails_after_its_call_are_not_given(reference):
    model = runner(reference)
    model.init_ascend_weight()
    model.acl_encoder_operation = FailsLate(model.acl_encoder_operation, 1)
    with pytest.raises(RuntimeError, match="an earlier step failed"):
        model.compute_logits([[1, 2]])
    assert model.cache.free_blocks == model.cache.num_blocks


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_compute_logits_loses_no_block(reference, monkeypatch, kind):
    model = runner(reference)

    def failing(*arguments, **keywords):
        raise kind

    monkeypatch.setattr(model, "forward", failing)
    with pytest.raises(kind):
        model.compute_logits([[1, 2]])
    assert model.cache.free_blocks == model.cache.num_blocks


SIZES = {
    "block_size 0": {"block_size": 0},
    "block_size -1": {"block_size": -1},
    "block_size of text": {"block_size": "16"},
    "block_size of true": {"block_size": True},
    "block_size beyond 32 bits": {"block_size": 2**31},
    "num_blocks 0": {"num_blocks": 0},
    "num_blocks of true": {"num_blocks": True},
    "num_blocks beyond 32 bits": {"num_blocks": 10**9},
    "num_blocks of a fraction": {"num_blocks": 1.5},
    "cache_gb 0": {"num_blocks": None, "cache_gb": 0},
    "cache_gb -1": {"num_blocks": None, "cache_gb": -1.0},
    "cache_gb nan": {"num_blocks": None, "cache_gb": math.nan},
    "cache_gb inf": {"num_blocks": None, "cache_gb": math.inf},
    "cache_gb of text": {"num_blocks": None, "cache_gb": "1"},
    "cache_gb of true": {"num_blocks": None, "cache_gb": True},
}


@pytest.mark.parametrize(("name", "sizes"), SIZES.items(), ids=SIZES)
def test_sizes_of_a_cache_that_make_no_sense_are_refused_by_name(reference, name, sizes):
    with pytest.raises((ValueError, TypeError), match=name.split()[0]):
        _ = runner(reference, **sizes).cache


def test_a_cache_that_memory_does_not_hold_is_refused_with_its_bytes():
    sizes = {"num_layers": 3, "kv_heads": 2**20, "head_size": 2**20, "dtype": torch.float32}
    with pytest.raises(ValueError, match=rf"takes {3 * 2 * 4 * 16 * 2**60} bytes .* lower num_blocks or cache_gb"):
        PagedCache(num_blocks=2**20, block_size=16, device=torch.device("cpu"), **sizes)


@pytest.mark.parametrize("cache_gb", [1e9, 1e300, 10**400])
def test_memory_beyond_any_machine_makes_as_many_blocks_as_slots_can_name(cache_gb):
    sizes = {"num_layers": 3, "block_size": 100, "kv_heads": 2, "head_size": 16, "dtype": torch.float32}
    assert PagedCache.blocks_for_memory(cache_gb, free_memory=1, **sizes) == (2**31 - 1) // 100


def test_the_memory_given_to_the_cache_decides_its_blocks(reference):
    block_bytes = 2 * SHAPE.layers * 16 * SHAPE.kv_heads * SHAPE.head_size * 4
    cache = runner(reference, num_blocks=None, cache_gb=10.5 * block_bytes / 2**30).cache
    assert cache.num_blocks == 10
    assert sum(tensor.nbytes for pair in cache.pairs for tensor in pair) == 10 * block_bytes


# ---- what a prompt may be --------------------------------------------------------------------------


KINDS = {
    "tuples": tuple,
    "tensors": torch.tensor,
    "int32 tensors": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "ranges": lambda ids: range(ids[0], ids[0] + len(ids)),
    "iterators": iter,
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_token_ids_may_come_in_any_sequence(reference, kind):
    prompts = [[1, 2, 3], [4, 5]]
    model = runner(reference)
    expected = model.generate(prompts, max_new_tokens=4)
    assert model.generate([kind(prompt) for prompt in prompts], max_new_tokens=4) == expected
    assert model.generate((kind(prompt) for prompt in prompts), max_new_tokens=4) == expected
    logits = model.compute_logits([kind(prompt) for prompt in prompts])
    for mine, theirs in zip(logits, model.compute_logits(prompts), strict=True):
        assert torch.equal(mine, theirs)


def test_prompts_are_not_changed_and_answers_are_the_callers_own(reference):
    prompts = [[1, 2, 3], [4, 5]]
    model = runner(reference)
    answers = model.generate(prompts, max_new_tokens=4)
    assert prompts == [[1, 2, 3], [4, 5]]
    assert all(type(token) is int for answer in answers for token in answer.token_ids)
    answers[0].token_ids.clear()
    assert len(model.generate(prompts, max_new_tokens=4)[0].token_ids) == 4
