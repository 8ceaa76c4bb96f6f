"""Times every large operation case and says what part of this machine's measured rates it reaches.

    python benchmarks/bench_ops.py [--dtype bfloat16] [--filter Linear] [--seconds 0.3]

The rates are measured in the same run: modeltorch's probe reading memory with every thread, as in `modeltorch bench`,
and a large matrix product of the library that torch uses. A case's reference time is the larger of its bytes over the
one and its operations over the other; a case whose data stays in the caches may be faster. Medians; the spread is that
of the timed runs.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from operation_cases import BENCHMARK_CASES, Case

from modeltorch.limits import ReadRate
from modeltorch.subject import hardware

READ_SAMPLES = 9


def median_seconds(body: Callable[[], Any], seconds: float) -> tuple[float, float, float]:
    """Median, least and most time of a call, from as many calls as fit `seconds` (three at least)."""
    body()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        body()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples), min(samples), max(samples)


def read_rate() -> float:
    """Bytes a second that modeltorch's probe reads from memory with every thread."""
    rate = ReadRate()
    for _ in range(READ_SAMPLES):
        rate.sample()
    return rate.rate() * 1e9


def multiply_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product."""
    size = 2048
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, 1.0)[1]


def moved_bytes(case: Case, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    """Bytes that a run must read and write at least."""
    if case.operation == "PagedAttention":
        rows = int(inputs[4].sum())
        row_bytes = inputs[1].shape[2] * inputs[1].shape[3] * inputs[1].element_size()
        return 2 * rows * row_bytes + inputs[0].nbytes + outputs[0].nbytes
    return sum(tensor.nbytes for tensor in [*inputs, *outputs])


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--filter", default="", help="only cases whose name holds this text")
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on a case")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    read, multiply = read_rate(), multiply_rate(dtype)
    print(f"{hardware(torch.device('cpu'))}, {arguments.dtype}: reads {read / 1e9:.1f} GB/s", end=", ")
    print(f"multiplies {multiply / 1e9:.0f} GFLOP/s")
    for case in BENCHMARK_CASES:
        if arguments.filter not in str(case):
            continue
        inputs = case.make(torch.Generator().manual_seed(0), dtype)
        operation = torch.classes.ModelTorch.Operation(case.operation, case.parameters)
        moved = moved_bytes(case, inputs, operation.run(inputs))
        median, least, most = median_seconds(functools.partial(operation.run, inputs), arguments.seconds)
        reference = max(moved / read, case.flops / multiply)
        rate = f"{case.flops / median / 1e9:8.1f} GFLOP/s" if case.flops else " " * 16
        print(
            f"{case!s:48} {median * 1e6:10.1f} us ({least * 1e6:.1f} to {most * 1e6:.1f}) "
            f"{moved / median / 1e9:7.1f} GB/s {rate} {reference / median:6.1%} of the reference"
        )


if __name__ == "__main__":
    main()
