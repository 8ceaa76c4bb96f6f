"""CTranslate2: its generator, requests as one list that it sorts and batches itself."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import ctranslate2
from harness import Peer, main

_BATCH = 8  # it reads the prompts of a batch side by side only up to the shortest one: small batches of like lengths


class CTranslate2(Peer):
    """A generator; dtype is one of its compute types, weights included."""

    version = ctranslate2.__version__

    @classmethod
    def convert(cls, checkpoint: Path, converted: Path, dtype: str) -> None:
        """Its converter of Hugging Face checkpoints."""
        converter = ctranslate2.converters.TransformersConverter(str(checkpoint), low_cpu_mem_usage=True)
        converter.convert(str(converted), quantization=dtype, force=True)

    def __init__(self, checkpoint: Path, converted: Path, dtype: str, threads: int) -> None:
        """Loads the model, and the words that stand for ids."""
        self.model = ctranslate2.Generator(
            str(converted), compute_type=dtype, inter_threads=1, intra_threads=threads, max_queued_batches=-1
        )
        self.words: list[str] = json.loads((converted / "vocabulary.json").read_text())

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        """Moments of the start and of every step, the prefill's first."""
        words = [[self.words[token] for token in prompt] for prompt in prompts]
        seen = dict.fromkeys(range(len(prompts)), 0)
        moments = [time.perf_counter()]

        def on_token(result: ctranslate2.GenerationStepResult) -> bool:
            seen[result.batch_id] += 1
            if result.batch_id == len(prompts) - 1:
                moments.append(time.perf_counter())
            return False

        self.model.generate_batch(
            words,
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=on_token,
        )
        if set(seen.values()) != {new_tokens}:
            raise RuntimeError(f"expected {new_tokens} new tokens a sequence, got {sorted(set(seen.values()))}")
        return moments

    def prefill(self, prompt: list[int], runs: int) -> list[float]:
        """Generation of one token."""
        moments = [self._generate([prompt], 1) for _ in range(runs + 1)]
        return [end - start for start, end in moments[1:]]

    def decode(self, prompts: list[list[int]], warm_up: int, steps: int) -> list[float]:
        """Times between the tokens of the last sequence."""
        moments = self._generate(prompts, 1 + warm_up + steps)[1 + warm_up :]
        return [end - start for start, end in itertools.pairwise(moments)]

    def serve(self, prompts: list[list[int]], new_tokens: int) -> float:
        """All requests in one call."""
        words = [[self.words[token] for token in prompt] for prompt in prompts]
        start = time.perf_counter()
        answers = self.model.generate_batch(
            words,
            max_batch_size=_BATCH,
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        seconds = time.perf_counter() - start
        if any(len(answer.sequences_ids[0]) != new_tokens for answer in answers):
            raise RuntimeError(f"an answer has not {new_tokens} new tokens")
        return seconds


if __name__ == "__main__":
    main(CTranslate2, __doc__)
