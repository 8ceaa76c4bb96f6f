"""Hugging Face transformers: eager, sdpa attention, the dynamic cache; requests as one left-padded batch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import Peer, main
from transformers import AutoModelForCausalLM, DynamicCache


class Transformers(Peer):
    """The model as `from_pretrained` gives it."""

    version = transformers.__version__

    @classmethod
    def convert(cls, checkpoint: Path, converted: Path, dtype: str) -> None:
        """It reads the checkpoint itself."""

    @torch.no_grad()
    def __init__(self, checkpoint: Path, converted: Path, dtype: str, threads: int) -> None:
        """Loads the model."""
        torch.set_num_threads(threads)
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
        self.model = model.eval()

    @torch.no_grad()
    def prefill(self, prompt: list[int], runs: int) -> list[float]:
        """A forward pass with logits of the last row."""
        ids = torch.tensor([prompt])
        times = []
        for _ in range(runs + 1):
            start = time.perf_counter()
            self.model(ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1).logits.argmax(-1)
            times.append(time.perf_counter() - start)
        return times[1:]

    @torch.no_grad()
    def decode(self, prompts: list[list[int]], warm_up: int, steps: int) -> list[float]:
        """Forward passes of one row a sequence."""
        cache = DynamicCache()
        ids = self.model(torch.tensor(prompts), past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        times = []
        for _ in range(warm_up + steps):
            start = time.perf_counter()
            ids = self.model(ids, past_key_values=cache, use_cache=True).logits.argmax(-1)
            times.append(time.perf_counter() - start)
        return times[warm_up:]

    @torch.no_grad()
    def serve(self, prompts: list[list[int]], new_tokens: int) -> float:
        """`generate` over all requests at once."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        start = time.perf_counter()
        answers = self.model.generate(
            ids, attention_mask=mask, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens
        )
        seconds = time.perf_counter() - start
        if answers.shape[1] != longest + new_tokens:
            raise RuntimeError(f"expected {new_tokens} new tokens, got {answers.shape[1] - longest}")
        return seconds


if __name__ == "__main__":
    main(Transformers, __doc__)
