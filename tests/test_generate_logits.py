"""compute_logits: every position, through the paged path."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import random_model, reference_logits, relative_error
from watched_models import GOOD, SHAPE, Step, runner, small_shapes, watched

pytestmark = pytest.mark.usefixtures("one_thread")


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
