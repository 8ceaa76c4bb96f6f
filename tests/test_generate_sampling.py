"""Tokens that are drawn: from the right distribution, the same from the same seed, greedy ones beside them."""

from __future__ import annotations

import pytest
import torch
from reference import Shape, random_model, reference_logits
from transformers import Qwen2ForCausalLM
from watched_models import runner

from modeltorch.engine import Engine, Request
from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM
from modeltorch.sampling import Sampler, Sampling, SamplingRows

pytestmark = pytest.mark.usefixtures("one_thread")

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
        neighbours = [Sampling(1.0), Sampling(1.0, top_k=3), Sampling(0.5, top_p=0.5)]
        requests = [Request([7, 8], 8, sampling=neighbours[i % 3]) for i in range(others)]
        requests.insert(others // 2, Request([1, 2], 12, sampling=Sampling(1.5, seed=seed)))
        return Engine(runner(reference)).run(requests)[others // 2].token_ids

    assert drawn(0, 5) == drawn(3, 5) == drawn(6, 5)
    assert drawn(0, 5) != drawn(0, 6)
    answers = runner(reference).generate([[1, 2], [1, 2]], max_new_tokens=12, temperature=1.5, seed=5)
    assert answers[0].token_ids == answers[1].token_ids == drawn(0, 5)


def splitmix64(seed: int, count: int) -> float:
    """Number `count` of the sequence of a seed, in plain Python."""

    def mixed(bits: int) -> int:
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) % 2**64
        return bits ^ (bits >> 31)

    return (mixed((mixed(seed) + (count + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 11) * 2.0**-53


def test_the_numbers_of_a_seed_depend_on_it_and_on_the_tokens_drawn_so_far_alone():
    seeds = [0, 1, 7, None, 2**63 - 1]
    rows = SamplingRows([Sampling(1.0, seed=seed) for seed in seeds], torch.device("cpu"), [0, 3, 0, 0, 100])
    drawn = [rows.uniforms().squeeze(1).tolist() for _ in range(200)]
    for step, numbers in enumerate(drawn):
        for row, first in ((0, 0), (1, 3), (2, 0), (4, 100)):
            assert numbers[row] == splitmix64(seeds[row], first + step)
    assert len({numbers[3] for numbers in drawn}) == 200
    assert abs(sum(numbers[0] for numbers in drawn) / 200 - 0.5) < 0.1


def test_no_greedy_token_is_looked_for_where_every_row_is_drawn(monkeypatch):
    logits = torch.randn(3, 11)
    sampler = Sampler()
    monkeypatch.setattr(sampler, "_greedy", None)
    assert len(sampler.choose(logits, SamplingRows([Sampling(1.0)] * 3, logits.device))) == 3
    with pytest.raises(TypeError):
        sampler.choose(logits, SamplingRows([Sampling(1.0), Sampling(0.0), Sampling(1.0)], logits.device))


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
