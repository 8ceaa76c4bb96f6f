"""modeltorch beside Hugging Face transformers, in turn, in one process, on the same weights.

    python benchmarks/bench_transformers.py [--shape qwen2.5-0.5b] [--dtype bfloat16] [--runs 5] [--json FILE]

Prints medians with their range, and the ratio. transformers runs eagerly with sdpa attention and its dynamic cache,
as `model.generate` does by default.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from modeltorch.engine import DecodeBatch, Engine, Request
from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM
from modeltorch.shapes import SHAPES
from modeltorch.subject import Subject, hardware


def make_both(shape_name: str, dtype: torch.dtype) -> tuple[Subject, Any]:
    """Both engines over the same random weights."""
    shape = SHAPES[shape_name]
    sizes = dataclasses.asdict(shape)
    theta = sizes.pop("rope_theta")
    config = Qwen2Config(**sizes, rope_parameters={"rope_theta": theta, "rope_type": "default"})
    weights = dict(shape.random_weights(dtype))
    with torch.device("meta"):
        theirs: Any = Qwen2ForCausalLM(config)
    theirs.load_state_dict(weights, strict=False, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    mine = FlashQwen2ForCausalLM(shape, weights, dtype=dtype)
    mine.init_ascend_weight()
    return Subject(shape_name, mine), theirs.eval()


@torch.no_grad()
def their_prefill(model: Any, length: int) -> Callable[[], Any]:
    """A prefill of one prompt, logits of the last row only."""
    ids = torch.randint(0, model.config.vocab_size, (1, length))
    return lambda: model(ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1).logits.argmax(-1)


def my_prefill(subject: Subject, length: int) -> Callable[[], Any]:
    """The same through the engine."""
    engine = Engine(subject.model)
    request = Request(torch.randint(0, subject.model.vocab_size, (length,)).tolist(), 1)
    engine.check(request)
    request.blocks = engine.cache.allocate(engine.cache.blocks_needed(length))
    return lambda: engine.prefill_step([request])


def their_decode(model: Any, batch: int, context: int) -> Callable[[], Any]:
    """A decode step in a growing context."""
    cache = DynamicCache()
    model(torch.randint(0, model.config.vocab_size, (batch, context)), past_key_values=cache, logits_to_keep=1)
    state = {"ids": torch.zeros(batch, 1, dtype=torch.int64)}

    def step() -> None:
        state["ids"] = model(state["ids"], past_key_values=cache, use_cache=True).logits.argmax(-1)

    return step


def my_decode(subject: Subject, batch: int, context: int) -> Callable[[], Any]:
    """The same through the engine."""
    engine = Engine(subject.model)
    ids = torch.randint(0, subject.model.vocab_size, (batch, context))
    requests = [Request(row.tolist(), 256) for row in ids]
    for request in requests:
        engine.check(request)
        request.blocks = engine.cache.allocate(engine.cache.blocks_needed(request.limit))
    for request, token in zip(requests, engine.prefill_step(requests).tolist(), strict=True):
        request.new_tokens.append(token)
    steps = DecodeBatch(requests, engine.cache.block_size, subject.model.device)
    return lambda: engine.decode_step(steps)


def in_turn(mine: Callable[[], Any], theirs: Callable[[], Any], runs: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each, taken alternately after a warm-up."""
    samples: tuple[list[float], list[float]] = ([], [])
    for run in range(runs + 1):
        for body, times in zip((mine, theirs), samples, strict=True):
            start = time.perf_counter()
            body()
            if run:
                times.append((time.perf_counter() - start) * 1e3)
    return samples


@torch.no_grad()
def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=tuple(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    subject, theirs = make_both(arguments.shape, getattr(torch, arguments.dtype))
    workloads = {f"prefill_b1_s{n}": (my_prefill(subject, n), their_prefill(theirs, n)) for n in (128, 512)}
    for batch, context in ((1, 128), (1, 2048), (8, 128)):
        pair = my_decode(subject, batch, context), their_decode(theirs, batch, context)
        workloads[f"decode_b{batch}_ctx{context}"] = pair
    print(f"{arguments.shape} {arguments.dtype}, {hardware(subject.model.device)}; ms, median (least to most)")
    for name, (mine, other) in workloads.items():
        runs = arguments.runs if name.startswith("prefill") else 4 * arguments.runs
        columns, medians = [], []
        for engine, times in zip(("modeltorch", "transformers"), in_turn(mine, other, runs), strict=True):
            medians.append(statistics.median(times))
            columns.append(f"{engine} {medians[-1]:8.1f} ({min(times):.1f} to {max(times):.1f})")
        print(f"{name:18} {columns[0]}  {columns[1]}  {medians[1] / medians[0]:.2f} times as fast", flush=True)
        if arguments.json:
            line = {"workload": name, "modeltorch_ms": medians[0], "transformers_ms": medians[1]}
            with Path(arguments.json).open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
