"""OpenVINO GenAI: its pipeline of continuous batching over paged attention, computing in bfloat16."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy
import openvino
import openvino_genai
from harness import Peer, main

_BATCHED_TOKENS = 4096  # so that a prompt is one step, as in its pipeline for a single user
_CACHE_GB = 2


class OpenVino(Peer):
    """A model that optimum exported; the weights are stored as float16 and computed with in dtype."""

    version = openvino_genai.__version__

    @classmethod
    def convert(cls, checkpoint: Path, converted: Path, dtype: str) -> None:
        """The export of optimum."""
        export = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino"]
        options = ["--task", "text-generation-with-past", "--weight-format", "fp16"]
        subprocess.run([*export, "--model", str(checkpoint), *options, str(converted)], check=True)

    def __init__(self, checkpoint: Path, converted: Path, dtype: str, threads: int) -> None:
        """Loads the model."""
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = _CACHE_GB
        scheduler.max_num_batched_tokens = _BATCHED_TOKENS
        short = {"bfloat16": "bf16", "float32": "f32"}[dtype]
        properties = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": short,
            "KV_CACHE_PRECISION": short,
        }
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(str(converted), scheduler, "CPU", properties)

    def _steps(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        """Times of the steps that answer the prompts."""
        config = openvino_genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        times = []
        start = time.perf_counter()
        handles = []  # a request whose handle is gone is dropped
        for number, prompt in enumerate(prompts):
            ids = openvino.Tensor(numpy.array([prompt], dtype=numpy.int64))
            handles.append(self.pipeline.add_request(number, ids, config))
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            end = time.perf_counter()
            times.append(end - start)
            start = end
        counts = {len(handle.read_all()[0].generated_ids) for handle in handles}
        if counts != {new_tokens}:
            raise RuntimeError(f"expected {new_tokens} new tokens a sequence, got {sorted(counts)}")
        return times

    def prefill(self, prompt: list[int], runs: int) -> list[float]:
        """Requests for one token."""
        return [sum(self._steps([prompt], 1)) for _ in range(runs + 1)][1:]

    def decode(self, prompts: list[list[int]], warm_up: int, steps: int) -> list[float]:
        """Steps of the pipeline after the one that reads the prompts."""
        times = self._steps(prompts, 1 + warm_up + steps)
        if len(times) != 1 + warm_up + steps:
            raise RuntimeError(f"expected {1 + warm_up + steps} steps of the pipeline, got {len(times)}")
        return times[1 + warm_up :]

    def serve(self, prompts: list[list[int]], new_tokens: int) -> float:
        """All requests added at once."""
        return sum(self._steps(prompts, new_tokens))


if __name__ == "__main__":
    main(OpenVino, __doc__)
