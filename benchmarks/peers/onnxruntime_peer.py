"""ONNX Runtime GenAI: its generator on the CPU, requests as one right-padded batch.

Its engine of continuous batching needs paged attention, which its model builder refuses for the CPU. A padded batch
gets right answers only from a model whose head computes the logits of every token; all else runs faster on one whose
head computes the last token's only, so there are both.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy
import onnxruntime_genai
from harness import Peer, main


class OnnxRuntime(Peer):
    """The models that its own builder exported, one loaded at a time."""

    version = onnxruntime_genai.__version__

    @classmethod
    def convert(cls, checkpoint: Path, converted: Path, dtype: str) -> None:
        """The model builder for the CPU."""
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-p", dtype]
        for head, prune in (("last", "true"), ("every", "false")):
            folders = ["-i", str(checkpoint), "-o", str(converted / head), "-c", str(converted / "cache")]
            subprocess.run([*builder, *folders, "--extra_options", f"prune_lm_head={prune}"], check=True)

    def __init__(self, checkpoint: Path, converted: Path, dtype: str, threads: int) -> None:
        """Loads the model with the smaller head."""
        self.converted = converted
        self.threads = threads
        self.pad: int = json.loads((checkpoint / "config.json").read_text())["pad_token_id"]
        self.head = ""
        self._load("last")

    def _load(self, head: str) -> None:
        if head == self.head:
            return
        self.head, self.model = head, None
        config = onnxruntime_genai.Config(str(self.converted / head))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": self.threads}}}}))
        self.model = onnxruntime_genai.Model(config)

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        """Moments of the start and of every token, the prefill's first."""
        longest = max(map(len, prompts))
        ids = numpy.array([prompt + [self.pad] * (longest - len(prompt)) for prompt in prompts], dtype=numpy.int32)
        length = longest + new_tokens
        parameters = onnxruntime_genai.GeneratorParams(self.model)
        parameters.set_search_options(
            batch_size=len(prompts), max_length=length, min_length=length, do_sample=False, chunk_size=0
        )
        moments = [time.perf_counter()]
        generator = onnxruntime_genai.Generator(self.model, parameters)
        generator.append_tokens(ids)
        for _ in range(new_tokens):
            generator.generate_next_token()
            moments.append(time.perf_counter())
        if generator.token_count() != length:
            raise RuntimeError(f"expected {length} tokens, got {generator.token_count()}")
        return moments

    def prefill(self, prompt: list[int], runs: int) -> list[float]:
        """Generation of one token."""
        self._load("last")
        moments = [self._generate([prompt], 1) for _ in range(runs + 1)]
        return [end - start for start, end in moments[1:]]

    def decode(self, prompts: list[list[int]], warm_up: int, steps: int) -> list[float]:
        """Times between tokens."""
        self._load("last")
        moments = self._generate(prompts, 1 + warm_up + steps)[1 + warm_up :]
        return [end - start for start, end in itertools.pairwise(moments)]

    def serve(self, prompts: list[list[int]], new_tokens: int) -> float:
        """All requests as one batch."""
        self._load("every")
        moments = self._generate(prompts, new_tokens)
        return moments[-1] - moments[0]


if __name__ == "__main__":
    main(OnnxRuntime, __doc__)
