"""The Python front end on device npu: the bundled checkpoint does sums there too."""

from __future__ import annotations

import pytest
import torch
from stand_in import count

from modeltorch import checkpoint
from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM

PROMPTS = ["345+678=", "12-345=", "max 271 828 182="]


class Greedy:
    """Greedy decoding through forward(), with the choice of the token on the CPU: torch's own operations on npu
    tensors need the vendor's operator library, which the stand-in does not have."""

    def __init__(self, model: FlashQwen2ForCausalLM, prompts: list[str]) -> None:
        self.model = model
        self.sequences = [model.encode(prompt) for prompt in prompts]
        self.answers: list[list[int]] = [[] for _ in prompts]
        cache = model.cache
        self.blocks = [cache.allocate(cache.blocks_needed(64)) for _ in prompts]
        self.block_size = cache.block_size

    def slot(self, sequence: int, position: int) -> int:
        return self.blocks[sequence][position // self.block_size] * self.block_size + position % self.block_size

    def forward(self, active: list[int], is_prefill: bool) -> torch.Tensor:
        ids, positions, slots, lengths = [], [], [], []
        for n in active:
            tokens = self.sequences[n]
            lengths.append(len(tokens))
            for position in range(len(tokens)) if is_prefill else [len(tokens) - 1]:
                ids.append(tokens[position])
                positions.append(position)
                slots.append(self.slot(n, position))
        tables = torch.tensor([self.blocks[n] for n in active], dtype=torch.int32)
        rows = torch.tensor(lengths).cumsum(0) - 1 if is_prefill else None
        logits = self.model.forward(
            torch.tensor(ids),
            torch.tensor(positions),
            is_prefill,
            self.model.cache.pairs,
            tables,
            torch.tensor(slots, dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
            max(lengths),
            rows,
        )
        return logits.cpu()

    def run(self) -> list[str]:
        active = list(range(len(self.sequences)))
        is_prefill = True
        while active:
            tokens = self.forward(active, is_prefill).argmax(dim=-1).tolist()
            is_prefill = False
            for n, token in zip(active, tokens, strict=True):
                self.answers[n].append(token)
                self.sequences[n].append(token)
            active = [n for n in active if self.answers[n][-1] not in self.model.stop_tokens]
            assert all(len(answer) < 40 for answer in self.answers)
        return [self.model.tokenizer.decode(answer, skip_special_tokens=True) for answer in self.answers]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_bundled_checkpoint_answers_on_the_npu(dtype):
    model = FlashQwen2ForCausalLM.from_pretrained(checkpoint.BUNDLED, device="npu", dtype=dtype, num_blocks=8)
    before = count("operations")
    answers = Greedy(model, PROMPTS).run()
    assert count("operations") > before
    on_cpu = FlashQwen2ForCausalLM.from_pretrained(checkpoint.BUNDLED, dtype=dtype, num_blocks=8)
    assert answers == [generation.text for generation in on_cpu.generate(PROMPTS)]
    assert [answer.strip() for answer in answers] == ["1023", "-333", "828"]


def test_float32_is_refused_with_the_node():
    model = FlashQwen2ForCausalLM.from_pretrained(checkpoint.BUNDLED, device="npu", dtype="float32", num_blocks=8)
    with pytest.raises(NotImplementedError, match=r"node embedding .*Ascend computes in float16 or bfloat16"):
        Greedy(model, PROMPTS[:1]).forward([0], True)
