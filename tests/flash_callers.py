"""A caller of the helpers of a step: its own caches, block tables, slots and positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from reference import Shape, reference_logits
from transformers import Qwen2ForCausalLM

SHAPE = Shape(layers=2)


BLOCK_SIZE = 16


BLOCKS = 24


PROMPTS = [list(range(40)), [9], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], [100, 2, 77]]


TOLERANCE = 1e-4


Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def new_caches(blocks: int = BLOCKS) -> Pairs:
    """A caller's own caches; rows that nobody wrote are NaN."""
    shape = (blocks, BLOCK_SIZE, SHAPE.kv_heads, SHAPE.head_size)
    return [(torch.full(shape, float("nan")), torch.full(shape, float("nan"))) for _ in range(SHAPE.layers)]


class Caller:
    """What a script does around forward: block tables in any order, slots, positions."""

    def __init__(self, caches: Pairs, prompts: Sequence[Sequence[int]] = PROMPTS) -> None:
        self.caches = caches
        self.sequences = [list(prompt) for prompt in prompts]
        order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(5)).tolist()
        width = max(len(prompt) for prompt in prompts) // BLOCK_SIZE + 2
        self.tables = torch.tensor([[order.pop() for _ in range(width)] for _ in prompts])
        assert not torch.equal(self.tables.flatten(), self.tables.flatten().sort().values)

    def slot(self, sequence: int, position: int) -> int:
        block = int(self.tables[sequence, position // BLOCK_SIZE])
        return block * BLOCK_SIZE + position % BLOCK_SIZE

    def prefill(self) -> tuple:
        """The arguments of forward up to max_seq_len."""
        places = [(n, place) for n, tokens in enumerate(self.sequences) for place in range(len(tokens))]
        return (
            torch.tensor([self.sequences[n][place] for n, place in places]),
            torch.tensor([place for _, place in places]),
            True,
            self.caches,
            self.tables,
            torch.tensor([self.slot(n, place) for n, place in places]),
            torch.tensor([len(tokens) for tokens in self.sequences]),
            max(len(tokens) for tokens in self.sequences),
        )

    def decode(self, new_tokens: Sequence[int]) -> tuple:
        """Appends a token to each sequence; the arguments of forward up to max_seq_len."""
        for tokens, token in zip(self.sequences, new_tokens, strict=True):
            tokens.append(token)
        lengths = [len(tokens) for tokens in self.sequences]
        return (
            torch.tensor(list(new_tokens)),
            torch.tensor([length - 1 for length in lengths]),
            False,
            self.caches,
            self.tables,
            torch.tensor([self.slot(n, length - 1) for n, length in enumerate(lengths)]),
            torch.tensor(lengths),
            max(lengths),
        )

    def every_row(self, reference: Qwen2ForCausalLM) -> torch.Tensor:
        return torch.cat([reference_logits(reference, tokens) for tokens in self.sequences])

    def last_rows(self, reference: Qwen2ForCausalLM) -> torch.Tensor:
        return torch.cat([reference_logits(reference, tokens)[-1:] for tokens in self.sequences])
