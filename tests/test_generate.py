"""Whole answers: greedy ones equal transformers', requests share the cache, models share the machine."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Shape, random_model
from transformers import Qwen2ForCausalLM
from watched_models import SHAPE, runner, small_shapes, watched

from modeltorch import arithmetic
from modeltorch.checkpoint import BUNDLED
from modeltorch.engine import DEFAULT_NEW_TOKENS, MAX_BATCH, Engine, Request
from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- greedy answers --------------------------------------------------------------------------------


@torch.no_grad()
def transformers_answer(
    model: Qwen2ForCausalLM, prompt: list[int], new_tokens: int, eos: int | None
) -> tuple[list[int], list[torch.Tensor]]:
    """The new tokens of a greedy answer, and the logits that each was chosen from."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=eos,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[0, len(prompt) :].tolist(), [logits[0] for logits in output.logits]


def is_close_call(row: torch.Tensor) -> bool:
    best = row.topk(2).values
    return bool(best[0] - best[1] <= 1e-4 * row.abs().max())


def assert_same_answer(mine: list[int], theirs: list[int], logits: list[torch.Tensor]) -> None:
    """Equal up to the first difference, which must be a close call; what follows one has another context."""
    differing = [n for n, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]]
    if differing:
        assert is_close_call(logits[differing[0]])
    else:
        assert mine == theirs


@given(
    shape=small_shapes(),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    new_tokens=st.integers(1, 12),
    block_size=st.sampled_from([1, 3, 16, 128]),
    spare=st.sampled_from([0, 1, 10, 200]),
    stops=st.booleans(),
    seed=st.integers(0, 99),
)
def test_greedy_answers_equal_transformers(shape, lengths, new_tokens, block_size, spare, stops, seed):
    reference = random_model(shape, seed)
    draw = random.Random(seed)
    prompts = [[draw.randrange(shape.vocab) for _ in range(length)] for length in lengths]
    # With nothing to spare the largest request has the cache to itself while the others wait.
    largest = -(-(max(lengths) + new_tokens) // block_size)
    sizes = {"block_size": block_size, "num_blocks": largest + spare}
    eos = None
    if stops:
        free = runner(reference, **sizes).generate(prompts[:1], max_new_tokens=new_tokens)
        eos = draw.choice(free[0].token_ids)
    model = runner(reference, stop_tokens=frozenset() if eos is None else frozenset({eos}), **sizes)
    answers = model.generate(prompts, max_new_tokens=new_tokens)
    assert len(answers) == len(prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        theirs, logits = transformers_answer(reference, prompt, new_tokens, eos)
        assert_same_answer(answer.token_ids, theirs, logits)
        assert answer.finish_reason == ("stop" if answer.token_ids[-1] == eos else "length")
        assert answer.text is None
    assert model.cache.free_blocks == model.cache.num_blocks == largest + spare


def test_answers_come_in_the_order_of_the_prompts(reference):
    prompts = [[n, n + 1, n + 2][: 1 + n % 3] for n in range(0, 60, 4)]
    alone = [runner(reference).generate([prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert len({tuple(answer.token_ids) for answer in alone}) > 4
    for order in (prompts, prompts[::-1], prompts[7:] + prompts[:7]):
        together = runner(reference).generate(order, max_new_tokens=5)
        assert together == [alone[prompts.index(prompt)] for prompt in order]


def test_no_prompts_give_no_answers(reference, monkeypatch):
    model = runner(reference)
    steps = watched(model, monkeypatch)
    assert model.generate([]) == []
    assert model.compute_logits([]) == []
    assert steps == []


# ---- the end of an answer --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def free_answer(reference) -> list[int]:
    """What follows the prompt [7, 3] when nothing ends it."""
    return runner(reference).generate([[7, 3]], max_new_tokens=8)[0].token_ids


def ending(reference: Qwen2ForCausalLM, *stop_tokens: int) -> FlashQwen2ForCausalLM:
    return runner(reference, stop_tokens=frozenset(stop_tokens))


def test_an_answer_may_end_with_its_first_token(reference, free_answer, monkeypatch):
    model = ending(reference, free_answer[0])
    steps = watched(model, monkeypatch)
    (answer,) = model.generate([[7, 3]], max_new_tokens=8)
    assert (answer.token_ids, answer.finish_reason) == (free_answer[:1], "stop")
    assert [step.is_prefill for step in steps] == [True]


def test_an_answer_ends_at_the_first_of_several_stop_tokens(reference, free_answer):
    distinct = list(dict.fromkeys(free_answer))
    model = ending(reference, *distinct[1:])
    (answer,) = model.generate([[7, 3]], max_new_tokens=8)
    end = free_answer.index(distinct[1]) + 1
    assert (answer.token_ids, answer.finish_reason) == (free_answer[:end], "stop")


def test_a_stop_token_in_the_last_place_counts_as_a_stop(reference, free_answer):
    end = free_answer.index(next(token for token in free_answer if token != free_answer[0])) + 1
    model = ending(reference, free_answer[end - 1])
    (answer,) = model.generate([[7, 3]], max_new_tokens=end)
    assert (answer.token_ids, answer.finish_reason) == (free_answer[:end], "stop")


def test_stop_tokens_can_be_ignored(reference, free_answer):
    model = ending(reference, *free_answer)
    (answer,) = model.generate([[7, 3]], max_new_tokens=8, ignore_eos=True)
    assert (answer.token_ids, answer.finish_reason) == (free_answer, "length")


def test_stop_tokens_of_the_prompt_end_nothing(reference, free_answer):
    model = ending(reference, 7, 3)
    assert not {7, 3} & set(free_answer)
    assert model.generate([[7, 3]], max_new_tokens=8)[0].token_ids == free_answer


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, DEFAULT_NEW_TOKENS), (253, DEFAULT_NEW_TOKENS), (257, 255), (509, 3), (511, 1)],
)
def test_the_default_length_of_an_answer_is_what_the_positions_leave(reference, length, expected):
    assert SHAPE.max_positions == 512
    model = runner(reference, num_blocks=32)
    (answer,) = model.generate([[5] * length])
    assert (len(answer.token_ids), answer.finish_reason) == (expected, "length")


# ---- continuous batching ---------------------------------------------------------------------------


def run(model: FlashQwen2ForCausalLM, *requests: tuple[int, int]) -> None:
    """Runs requests of (prompt length, new tokens)."""
    Engine(model).run([Request([9] * length, new_tokens) for length, new_tokens in requests])


def test_requests_that_fit_together_run_together(reference, monkeypatch):
    model = runner(reference, num_blocks=6)
    steps = watched(model, monkeypatch)
    run(model, *[(3, 5)] * 6)
    assert [(step.is_prefill, len(step.lengths)) for step in steps] == [(True, 6)] + [(False, 6)] * 4


def test_requests_run_one_by_one_only_where_the_cache_holds_no_more(reference, monkeypatch):
    model = runner(reference, num_blocks=1)
    steps = watched(model, monkeypatch)
    run(model, *[(3, 3)] * 3)
    assert [(step.is_prefill, step.lengths) for step in steps] == [
        (True, [3]),
        (False, [4]),
        (False, [5]),
    ] * 3


def test_finished_requests_leave_the_batch_between_steps(reference, monkeypatch):
    model = runner(reference)
    steps = watched(model, monkeypatch)
    run(model, (3, 2), (4, 4), (5, 1), (6, 3))
    assert [(step.is_prefill, step.lengths) for step in steps] == [
        (True, [3, 4, 5, 6]),
        (False, [4, 5, 7]),
        (False, [6, 8]),
        (False, [7]),
    ]


def test_waiting_requests_enter_as_soon_as_there_is_room(reference, monkeypatch):
    model = runner(reference, num_blocks=2)
    steps = watched(model, monkeypatch)
    run(model, (3, 6), (4, 2), (5, 2), (6, 2))
    assert [(step.is_prefill, sorted(step.lengths)) for step in steps] == [
        (True, [3, 4]),
        (False, [4, 5]),
        (True, [5]),
        (False, [5, 6]),
        (True, [6]),
        (False, [6, 7]),
        (False, [7]),
        (False, [8]),
    ]


def test_a_large_request_is_not_overtaken_for_ever(reference, monkeypatch):
    model = runner(reference, num_blocks=4)
    steps = watched(model, monkeypatch)
    run(model, (3, 4), (60, 4), *[(3, 4)] * 6)
    first = next(n for n, step in enumerate(steps) if 60 in step.lengths)
    assert sum(len(step.lengths) for step in steps[:first] if step.is_prefill) == 1


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7])
def test_answers_do_not_depend_on_who_shares_the_cache(reference, num_blocks):
    prompts = [[n, 3 * n, 5, n + 90][: 1 + n % 4] for n in range(9)]
    expected = [runner(reference).generate([prompt], max_new_tokens=9)[0] for prompt in prompts]
    assert runner(reference, num_blocks=num_blocks).generate(prompts, max_new_tokens=9) == expected


def test_more_requests_than_a_batch_holds_are_all_answered(reference, monkeypatch):
    prompts = [[n % 151, n // 151] for n in range(2 * MAX_BATCH + 5)]
    model = runner(reference, num_blocks=1000)
    steps = watched(model, monkeypatch)
    answers = model.generate(prompts, max_new_tokens=2)
    assert max(len(step.lengths) for step in steps) == MAX_BATCH
    picked = [0, MAX_BATCH - 1, MAX_BATCH, len(prompts) - 1]
    expected = runner(reference).generate([prompts[n] for n in picked], max_new_tokens=2)
    assert [answers[n] for n in picked] == expected
    assert len(answers) == len(prompts)


def test_one_prefill_takes_no_more_tokens_than_its_share_but_always_a_prompt(reference, monkeypatch):
    monkeypatch.setattr("modeltorch.engine.MAX_PREFILL_TOKENS", 20)
    model = runner(reference, num_blocks=100)
    steps = watched(model, monkeypatch)
    run(model, (8, 1), (12, 1), (1, 1), (50, 1), (20, 1), (3, 1))
    assert [step.lengths for step in steps] == [[8, 12], [1], [50], [20], [3]]


# ---- several models, several threads ---------------------------------------------------------------


def on_threads(bodies: list[Callable[[], None]]) -> list[BaseException]:
    """Runs each body on a thread of its own; returns what was raised."""
    raised: list[BaseException] = []

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def repeated_check(model: FlashQwen2ForCausalLM, prompts: list[list[int]], expected: list) -> None:
    for _ in range(10):
        assert model.generate(prompts, max_new_tokens=5) == expected


def test_two_models_on_two_threads_do_not_meet(reference):
    other = random_model(Shape(layers=3, tied=True), 1)
    prompts = [[1, 2, 3], [4, 5]]
    pairs = [(runner(source), runner(source)) for source in (reference, other)]
    expected = [fresh.generate(prompts, max_new_tokens=5) for fresh, _ in pairs]
    assert expected[0] != expected[1]
    bodies = [
        lambda model=model, answers=answers: repeated_check(model, prompts, answers)
        for (_, model), answers in zip(pairs, expected, strict=True)
    ]
    assert on_threads(bodies) == []


@pytest.mark.parametrize("num_blocks", [1, 16])
def test_one_model_on_several_threads_gives_everybody_the_right_answers(reference, num_blocks):
    prompts = [[1, 2, 3], [4, 5]]
    expected = runner(reference).generate(prompts, max_new_tokens=5)
    model = runner(reference, num_blocks=num_blocks)
    assert on_threads([lambda: repeated_check(model, prompts, expected)] * 4) == []
    assert model.cache.free_blocks == num_blocks


# ---- the checkpoint that ships ---------------------------------------------------------------------


BLOCKS = {"block_size": 32, "num_blocks": 600}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def bundled(request) -> FlashQwen2ForCausalLM:
    return FlashQwen2ForCausalLM.from_pretrained(BUNDLED, dtype=request.param, **BLOCKS)


def test_the_bundled_checkpoint_answers_prompts_that_it_was_not_trained_on(bundled):
    examples = arithmetic.held_out_prompts(1000)
    answers = bundled.generate([example.prompt for example in examples], max_new_tokens=32)
    right = sum(
        answer.text == example.answer and answer.finish_reason == "stop"
        for answer, example in zip(answers, examples, strict=True)
    )
    assert right >= 990


@pytest.mark.parametrize(
    "prompt", ["345+678=", "12-345=", "0+0=", "sort 31 4 15 926 5=", "max 271 828 182=", "reverse 1 2 3="]
)
def test_the_bundled_checkpoint_gives_exactly_the_tokens_of_the_answer(bundled, prompt):
    (answer,) = bundled.generate(prompt)
    right = arithmetic.solve(prompt)
    (end,) = bundled.stop_tokens
    assert answer.token_ids == [*bundled.encode(right), end]
    assert (answer.text, answer.finish_reason) == (right, "stop")
