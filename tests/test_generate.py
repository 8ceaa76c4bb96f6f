"""Whole answers: greedy ones equal transformers', requests share the cache, refusals cost nothing."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Shape, random_model, reference_logits, relative_error
from transformers import Qwen2ForCausalLM

from modeltorch import arithmetic
from modeltorch.checkpoint import BUNDLED
from modeltorch.engine import DEFAULT_NEW_TOKENS, MAX_BATCH, Engine, Request
from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM
from modeltorch.sampling import Sampler, Sampling, SamplingRows

SHAPE = Shape()


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models this small gain nothing from a second thread, and wait for it where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def reference() -> Qwen2ForCausalLM:
    return random_model(SHAPE)


def runner(reference: Qwen2ForCausalLM, **options: object) -> FlashQwen2ForCausalLM:
    """Our model over the weights of transformers' model; 8 blocks of 16 unless asked."""
    chosen = {"dtype": "float32", "block_size": 16, "num_blocks": 8, **options}
    return FlashQwen2ForCausalLM(reference.config, reference.state_dict(), **chosen)


@dataclass
class Step:
    """One call of forward: its phase, the contexts of its sequences, and which sequences they are."""

    is_prefill: bool
    lengths: list[int]


def watched(model: FlashQwen2ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The steps that the model runs from now on."""
    steps: list[Step] = []
    original = model.forward

    def forward(*arguments, **keywords):
        steps.append(Step(arguments[2], arguments[6].tolist()))
        return original(*arguments, **keywords)

    monkeypatch.setattr(model, "forward", forward)
    return steps


# ---- greedy answers ---------------------------------------------------------------------------------


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


@st.composite
def small_shapes(draw) -> Shape:
    kv_heads = draw(st.sampled_from([1, 2]))
    return Shape(
        heads=kv_heads * draw(st.sampled_from([1, 3])),
        kv_heads=kv_heads,
        layers=draw(st.integers(1, 2)),
        hidden=draw(st.sampled_from([32, 48])),
        vocab=draw(st.sampled_from([11, 60, 151])),
        tied=draw(st.booleans()),
        max_positions=64,
    )


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


# ---- the end of an answer ---------------------------------------------------------------------------


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


# ---- continuous batching ----------------------------------------------------------------------------


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


# ---- refusals and failures --------------------------------------------------------------------------

GOOD = [1, 2, 3]
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
    "num_blocks 0": {"num_blocks": 0},
    "num_blocks of a fraction": {"num_blocks": 1.5},
    "cache_gb 0": {"num_blocks": None, "cache_gb": 0},
    "cache_gb -1": {"num_blocks": None, "cache_gb": -1.0},
    "cache_gb nan": {"num_blocks": None, "cache_gb": math.nan},
    "cache_gb inf": {"num_blocks": None, "cache_gb": math.inf},
    "cache_gb of text": {"num_blocks": None, "cache_gb": "1"},
}


@pytest.mark.parametrize(("name", "sizes"), SIZES.items(), ids=SIZES)
def test_sizes_of_a_cache_that_make_no_sense_are_refused_by_name(reference, name, sizes):
    with pytest.raises((ValueError, TypeError), match=name.split()[0]):
        _ = runner(reference, **sizes).cache


def test_the_memory_given_to_the_cache_decides_its_blocks(reference):
    block_bytes = 2 * SHAPE.layers * 16 * SHAPE.kv_heads * SHAPE.head_size * 4
    cache = runner(reference, num_blocks=None, cache_gb=10.5 * block_bytes / 2**30).cache
    assert cache.num_blocks == 10
    assert sum(tensor.nbytes for pair in cache.pairs for tensor in pair) == 10 * block_bytes


# ---- several models, several threads ----------------------------------------------------------------


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


# ---- temperature ------------------------------------------------------------------------------------

TINY = Shape(vocab=8)
CHI_SQUARE_LIMIT = 35.0  # 7 degrees of freedom exceed it once in 100,000 draws


@pytest.fixture(scope="module")
def tiny() -> tuple[Qwen2ForCausalLM, FlashQwen2ForCausalLM]:
    reference = random_model(TINY)
    return reference, runner(reference, num_blocks=4096)


def chi_square(tokens: list[int], probabilities: torch.Tensor) -> float:
    counts = torch.bincount(torch.tensor(tokens), minlength=TINY.vocab).double()
    expected = probabilities.double() * len(tokens)
    assert expected.min() > 5  # below that the statistic does not follow its distribution
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_tokens_are_drawn_from_the_softmax_of_logits_over_temperature(tiny, temperature):
    reference, model = tiny
    prompt = [1, 2, 3]
    torch.manual_seed(1)
    answers = model.generate([prompt] * 4000, max_new_tokens=2, temperature=temperature)
    first = [answer.token_ids[0] for answer in answers]
    logits = reference_logits(reference, prompt)[-1]
    assert chi_square(first, (logits / temperature).softmax(0)) < CHI_SQUARE_LIMIT
    assert chi_square(first, (logits / (1.5 * temperature)).softmax(0)) > CHI_SQUARE_LIMIT
    # The second token comes from a decode step: its distribution is that of the context with the first.
    common = max(set(first), key=first.count)
    second = [answer.token_ids[1] for answer in answers if answer.token_ids[0] == common]
    logits = reference_logits(reference, [*prompt, common])[-1]
    assert chi_square(second, (logits / temperature).softmax(0)) < CHI_SQUARE_LIMIT


def test_greedy_requests_stay_greedy_among_drawn_ones(reference):
    model = runner(reference, num_blocks=64)
    prompts = [[n, 2 * n + 1] for n in range(20)]
    greedy = model.generate(prompts, max_new_tokens=6)
    torch.manual_seed(2)
    temperatures = [0.0 if n % 2 else 3.0 for n in range(20)]
    mixed = Engine(model).run(
        [Request(prompt, 6, sampling=Sampling(heat)) for prompt, heat in zip(prompts, temperatures, strict=True)]
    )
    assert mixed[1::2] == greedy[1::2]
    assert all(drawn != calm for drawn, calm in zip(mixed[0::2], greedy[0::2], strict=True))


def test_equal_logits_at_temperature_0_are_not_drawn_among():
    logits = torch.zeros(50, 4)
    logits[:, 1:3] = 1.0
    torch.manual_seed(0)
    for temperature, chosen in [(0.0, {1}), (1e-3, {1, 2})]:
        rows = SamplingRows([Sampling(temperature)] * 50, logits.device)
        assert set(Sampler().choose(logits, rows).tolist()) == chosen


def test_the_seed_of_torch_decides_what_is_drawn(reference):
    def drawn(seed: int) -> list:
        torch.manual_seed(seed)
        return runner(reference).generate([[1], [2, 3]], max_new_tokens=8, temperature=1.0)

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_a_seed_draws_the_same_whatever_else_is_in_the_batch(reference):
    def drawn(others: int, seed: int) -> list[int]:
        requests = [Request([7, 8], 8, sampling=Sampling(1.0)) for _ in range(others)]
        requests.insert(others // 2, Request([1, 2], 12, sampling=Sampling(1.5, seed=seed)))
        return Engine(runner(reference)).run(requests)[others // 2].token_ids

    assert drawn(0, 5) == drawn(3, 5) == drawn(6, 5)
    assert drawn(0, 5) != drawn(0, 6)
    answers = runner(reference).generate([[1, 2], [1, 2]], max_new_tokens=12, temperature=1.5, seed=5)
    assert answers[0].token_ids == answers[1].token_ids == drawn(0, 5)


def left_out(probabilities: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The distribution of top_k and then top_p, token by token in float64."""
    kept = torch.zeros_like(probabilities)
    chosen = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])[: top_k or None]
    total = sum(probabilities[token] for token in chosen)
    reached = 0.0
    for token in chosen:
        if reached >= top_p * total:
            break
        kept[token] = probabilities[token]
        reached += probabilities[token]
    return kept / kept.sum()


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.6), (5, 0.7), (1, 1.0), (100, 1.0), (0, 1e-9)])
def test_top_k_and_top_p_leave_the_improbable_out(tiny, top_k, top_p):
    reference, model = tiny
    prompt = [1, 2, 3]
    torch.manual_seed(3)
    answers = model.generate([prompt] * 4000, max_new_tokens=1, temperature=1.0, top_k=top_k, top_p=top_p)
    tokens = torch.tensor([answer.token_ids[0] for answer in answers])
    expected = left_out(reference_logits(reference, prompt)[-1].double().softmax(0), top_k, top_p)
    counts = torch.bincount(tokens, minlength=TINY.vocab).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    expected = expected[possible] * len(tokens)
    assert ((counts[possible] - expected) ** 2 / expected).sum() < CHI_SQUARE_LIMIT


def test_rows_of_one_batch_have_their_own_top_k_and_top_p():
    logits = torch.arange(6.0).expand(300, 6).contiguous()
    kinds = [Sampling(5.0, top_k=2), Sampling(5.0, top_p=1e-6), Sampling(5.0), Sampling(0.0, top_k=3)]
    torch.manual_seed(4)
    tokens = Sampler().choose(logits, SamplingRows((kinds * 75), logits.device)).view(75, 4)
    assert [set(column.tolist()) for column in tokens.t()] == [{4, 5}, {5}, {0, 1, 2, 3, 4, 5}, {5}]


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-4])
def test_a_temperature_near_zero_is_greedy(reference, temperature):
    greedy = runner(reference).generate([[1], [2, 3]], max_new_tokens=8)
    assert runner(reference).generate([[1], [2, 3]], max_new_tokens=8, temperature=temperature) == greedy


# ---- logits -----------------------------------------------------------------------------------------


@given(
    shape=small_shapes(),
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=5),
    block_size=st.sampled_from([1, 16, 128]),
    seed=st.integers(0, 99),
)
def test_logits_of_every_position_equal_transformers(shape, lengths, block_size, seed):
    reference = random_model(shape, seed)
    draw = random.Random(seed)
    sequences = [[draw.randrange(shape.vocab) for _ in range(length)] for length in lengths]
    blocks = -(-max(lengths) // block_size)  # nothing is generated: the sequences alone must fit
    model = runner(reference, block_size=block_size, num_blocks=blocks)
    found = model.compute_logits(sequences)
    assert len(found) == len(sequences)
    for tokens, logits in zip(sequences, found, strict=True):
        assert logits.dtype == torch.float32
        assert logits.shape == (len(tokens), shape.vocab)
        assert relative_error(logits, reference_logits(reference, tokens)) < 1e-4
    assert model.cache.free_blocks == blocks


def test_logits_of_a_bfloat16_model_are_float32_and_go_through_the_paged_path(reference, monkeypatch):
    model = runner(reference, dtype="bfloat16")
    steps = watched(model, monkeypatch)
    (logits,) = model.compute_logits([[1, 2, 3, 4]])
    assert logits.dtype == torch.float32
    assert relative_error(logits, reference_logits(reference, [1, 2, 3, 4])) < 0.05
    assert steps == [Step(True, [4])]
    assert model.cache.pairs[0][0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("sequences", "words"),
    [([GOOD, []], "at least one token"), ([[SHAPE.vocab]], str(SHAPE.vocab)), ([[5] * 129], "num_blocks")],
    ids=["empty", "outside the vocabulary", "larger than the cache"],
)
def test_sequences_without_logits_are_refused_before_anything_runs(reference, monkeypatch, sequences, words):
    model = runner(reference, num_blocks=8)
    steps = watched(model, monkeypatch)
    with pytest.raises(ValueError, match=words):
        model.compute_logits(sequences)
    assert steps == []
    assert model.cache.free_blocks == 8


def test_logits_of_a_sequence_beyond_the_models_positions_are_refused_and_one_that_fills_them_is_not(
    reference,
):
    model = runner(reference, num_blocks=40)
    assert model.compute_logits([[5] * 512])[0].shape == (512, SHAPE.vocab)
    with pytest.raises(ValueError, match="512 positions"):
        model.compute_logits([[5] * 513])


# ---- what a prompt may be ---------------------------------------------------------------------------

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


# ---- the checkpoint that ships ----------------------------------------------------------------------

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
