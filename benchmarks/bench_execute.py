"""What a decode step costs besides its arithmetic: time a layer and fixed time of execute().

    python benchmarks/bench_execute.py

Prints one JSON line {us_per_layer, fixed_us}: slope and intercept of the median decode execute() over 4, 12 and 24
layers of a model so small that nothing but the runner counts (float32, hidden 64, 1 head, intermediate 128, batch 1,
1 thread). Exits with status 1 if a layer costs 15 microseconds or more.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM
from modeltorch.shapes import Qwen2Shape

LAYERS = (4, 12, 24)
LIMIT_US_PER_LAYER = 15.0
STEPS = 2000


class Step:
    """A prepared decode step of a model of so many layers."""

    def __init__(self, layers: int) -> None:
        shape = Qwen2Shape(64, 64, 128, layers, 1, 1, False, max_position_embeddings=128)
        model = FlashQwen2ForCausalLM(shape, shape.random_weights(torch.float32), dtype="float32", num_blocks=2)
        one = torch.ones(1, dtype=torch.int64)
        arguments = (one, one, False, model.cache.pairs, torch.zeros(1, 1), one, one + 1, 2)
        model.forward(*arguments)
        self.inputs, self.parameters = model.prepare_inputs_for_ascend(*arguments)
        self.execute = model.acl_decoder_operation.execute

    def seconds(self) -> float:
        """One execute()."""
        start = time.perf_counter()
        self.execute(self.inputs, self.parameters)
        return time.perf_counter() - start


def main() -> int:
    """Prints the line; returns the exit status."""
    torch.set_num_threads(1)
    steps = [Step(layers) for layers in LAYERS]
    samples: list[list[float]] = [[] for _ in steps]
    for _ in range(STEPS):  # in turn, so that a slow moment of the machine touches all of them
        for step, times in zip(steps, samples, strict=True):
            times.append(step.seconds())
    slope, intercept = statistics.linear_regression(LAYERS, [statistics.median(times) * 1e6 for times in samples])
    print(json.dumps({"us_per_layer": round(slope, 3), "fixed_us": round(intercept, 3)}))
    return int(slope >= LIMIT_US_PER_LAYER)


if __name__ == "__main__":
    sys.exit(main())
