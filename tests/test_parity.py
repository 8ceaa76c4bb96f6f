"""The model against transformers' Qwen2ForCausalLM on random configurations."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import DEVICES, DTYPES, Layout, Runner, Shape, random_model, reference_logits, relative_error

FLOAT32_TOLERANCE = 1e-4
HALF_PRECISION_FACTOR = 1.5


@st.composite
def shapes(draw) -> Shape:
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    head_size = draw(st.sampled_from([16, 64, 80, 128]))
    return Shape(
        heads=kv_heads * draw(st.sampled_from([1, 2, 7])),
        kv_heads=kv_heads,
        head_size=head_size,
        layers=draw(st.integers(1, 3)),
        hidden=draw(st.sampled_from([48, 64, 200])),
        intermediate=draw(st.sampled_from([40, 77, 128])),
        vocab=draw(st.sampled_from([60, 151, 1000])),
        tied=draw(st.booleans()),
    )


@st.composite
def layouts(draw) -> Layout:
    transposes = [draw(st.sampled_from([0, 1])) for _ in range(7)]
    return Layout(
        model_name=draw(st.sampled_from(["qwen_PAModel", "qwen_DecoderModel", "qwen_QwenDecoderModel"])),
        qkv_packed=draw(st.booleans()),
        gate_up_packed=draw(st.booleans()),
        transposes=tuple(transposes),
        head_transpose=draw(st.sampled_from([-1, 0, 1])),
        extra_embedding_row=draw(st.booleans()),
    )


@st.composite
def lengths(draw) -> list[int]:
    """Prompt lengths of one batch, often at the edge of a block of 16."""
    length = st.one_of(st.integers(1, 5), st.sampled_from([15, 16, 17, 31, 33, 65]))
    return draw(st.lists(length, min_size=1, max_size=5))


def random_tokens(count: int, vocab: int, generator: torch.Generator) -> list[int]:
    return torch.randint(0, vocab, (count,), generator=generator).tolist()


def is_close_call(row: torch.Tensor) -> bool:
    """True where the two best logits lie within 1e-4 of the largest."""
    best = row.float().topk(2).values
    return bool(best[0] - best[1] <= 1e-4 * row.abs().max())


class Comparison:
    """A runner beside transformers in the same dtype and in float64.

    Half-precision errors are pooled over every logit of a test: the ratio of two single rows is mostly chance.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.same = copy.deepcopy(runner.model).to(runner.dtype)
        # The weights as both sides hold them, so that only the arithmetic differs.
        self.exact = copy.deepcopy(self.same).double()
        self.squares = {"mine": 0.0, "theirs": 0.0}

    def add(self, logits: torch.Tensor, sequences: list[list[int]], *, last_only: bool) -> None:
        pick = slice(-1, None) if last_only else slice(None)
        exact = torch.cat([reference_logits(self.exact, tokens)[pick] for tokens in sequences])
        same = torch.cat([reference_logits(self.same, tokens)[pick] for tokens in sequences])
        assert logits.dtype == self.runner.dtype
        assert logits.shape == exact.shape
        assert torch.isfinite(logits).all()
        if self.runner.dtype == torch.float32:
            assert relative_error(logits, same) < FLOAT32_TOLERANCE
            for mine, theirs in zip(logits, same, strict=True):
                assert mine.argmax() == theirs.argmax() or is_close_call(theirs)
        self.squares["mine"] += (logits.double() - exact).square().sum().item()
        self.squares["theirs"] += (same.double() - exact).square().sum().item()

    def check_half_precision(self) -> None:
        if self.runner.dtype != torch.float32:
            assert self.squares["mine"] ** 0.5 <= HALF_PRECISION_FACTOR * self.squares["theirs"] ** 0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    shape=shapes(),
    layout=layouts(),
    prompt_lengths=lengths(),
    block_size=st.sampled_from([1, 16, 128]),
    seed=st.integers(0, 99),
)
def test_prefill_and_decode_equal_transformers(device, dtype, shape, layout, prompt_lengths, block_size, seed):
    generator = torch.Generator().manual_seed(seed)
    blocks = sum(-(-(length + 4) // block_size) for length in prompt_lengths) + 3
    runner = Runner(shape, random_model(shape, seed), dtype, device, layout, block_size, blocks, seed)
    comparison = Comparison(runner)
    logits = runner.prefill([random_tokens(length, shape.vocab, generator) for length in prompt_lengths])
    comparison.add(logits, runner.tokens, last_only=False)
    for _ in range(3):
        # Some of the sequences, in any order: the batch of a step is whatever the caller says.
        order = torch.randperm(len(prompt_lengths), generator=generator).tolist()
        chosen = order[: max(1, len(order) - 1)]
        new = {sequence: random_tokens(1, shape.vocab, generator)[0] for sequence in chosen}
        logits = runner.decode(new)
        comparison.add(logits, [runner.tokens[sequence] for sequence in chosen], last_only=True)
    comparison.check_half_precision()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_rows_come_in_the_order_that_was_asked_for(dtype, layers, device):
    shape = Shape(layers=layers)
    runner = Runner(shape, random_model(shape), dtype, device)
    prompts = [[1, 2, 3, 4], [5, 6], [7]]
    every = runner.prefill(prompts)
    asked = [6, 0, 0, 5, 3]
    torch.testing.assert_close(runner.prefill(prompts, asked).float(), every[asked].float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_long_sequence_among_short_ones(dtype):
    shape = Shape(heads=7, kv_heads=1, head_size=64, hidden=96)
    runner = Runner(shape, random_model(shape), dtype, blocks=80)
    comparison = Comparison(runner)
    generator = torch.Generator().manual_seed(3)
    logits = runner.prefill([random_tokens(length, shape.vocab, generator) for length in (1, 300, 2, 129)])
    comparison.add(logits, runner.tokens, last_only=False)
    comparison.add(runner.decode({n: n + 1 for n in range(4)}), runner.tokens, last_only=True)
    comparison.check_half_precision()


def test_a_negative_slot_leaves_the_cache_alone():
    shape = Shape()
    runner = Runner(shape, random_model(shape))
    inputs, step = runner.prefill_inputs([[1, 2, 3]])
    slots = inputs[6]
    kept = slots[1].item()
    slots[1] = -1
    runner.encoder.execute(inputs, step)
    for cache in runner.caches:
        rows = cache.view(-1, shape.kv_heads, shape.head_size)
        assert rows[kept].isnan().all()
        assert not rows[slots[0].item()].isnan().any()


def test_no_tokens_give_no_rows():
    shape = Shape()
    runner = Runner(shape, random_model(shape))
    empty = runner.inputs([], [], [], torch.zeros(0, 1, dtype=torch.int32), [], torch.zeros(0, dtype=torch.int64))
    for step_object in (runner.encoder, runner.decoder):
        assert step_object.execute(empty, '{"seqLen": []}')[0].shape == (0, shape.vocab)
