"""What a decode step costs besides its arithmetic: time a layer and fixed time of execute().

    python benchmarks/bench_execute.py [--device cuda]

Prints one JSON line {us_per_layer, fixed_us}: slope and intercept of the median decode execute() over 4, 12 and 24
layers of a model so small that nothing but the runner counts (float32, hidden 64, 1 head, intermediate 128, batch 1,
1 thread). Exits with status 1 if a layer costs 15 microseconds or more.

On cuda: one JSON line {host_us_execute, host_us_step}, the host's work for one decode execute() and for one decode step
of the engine with its sampling, at batch 1 and 12 layers, while the GPU is never waited for. Exits with status 1 if
execute() takes 30 microseconds or more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch

from modeltorch.engine import DecodeBatch, Engine, Request
from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM
from modeltorch.shapes import Qwen2Shape

LAYERS = (4, 12, 24)
LIMIT_US_PER_LAYER = 15.0
STEPS = 2000
HOST_LIMIT_US = 30.0
HOST_STEPS = 64  # between two waits: few enough for the queue of launches


class Step:
    """A prepared decode step of a model of so many layers."""

    def __init__(self, layers: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        shape = Qwen2Shape(64, 64, 128, layers, 1, 1, False, max_position_embeddings=128)
        model = FlashQwen2ForCausalLM(
            shape, shape.random_weights(dtype, device), device=device, dtype=dtype, num_blocks=2
        )
        self.model = model
        one = torch.ones(1, dtype=torch.int64, device=device)
        tables = torch.zeros(1, 1, device=device)
        arguments = (one, one, False, model.cache.pairs, tables, one, one + 1, 2)
        model.forward(*arguments)
        self.inputs, self.parameters = model.prepare_inputs_for_ascend(*arguments)
        self.execute = model.acl_decoder_operation.execute

    def seconds(self) -> float:
        """One execute()."""
        start = time.perf_counter()
        self.execute(self.inputs, self.parameters)
        return time.perf_counter() - start


def on_cuda() -> int:
    """Prints the line of a GPU; returns the exit status."""
    step = Step(12, "cuda", torch.bfloat16)
    engine = Engine(step.model)
    request = Request([1], 100, ignore_eos=True, blocks=[0], new_tokens=[1])
    times: dict[str, list[float]] = {"host_us_execute": [], "host_us_step": []}
    for _ in range(20):
        batch = DecodeBatch([request], engine.cache.block_size, step.model.device)
        engine.decode_step(batch)
        for name, run in (("host_us_execute", step.seconds), ("host_us_step", lambda b=batch: engine.decode_step(b))):
            torch.cuda.synchronize()
            for _ in range(HOST_STEPS - 2):
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    medians = {name: round(statistics.median(values) * 1e6, 2) for name, values in times.items()}
    print(json.dumps(medians))
    return int(medians["host_us_execute"] >= HOST_LIMIT_US)


def main() -> int:
    """Prints the line; returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    if parser.parse_args().device == "cuda":
        return on_cuda()
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
