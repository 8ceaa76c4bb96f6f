"""Runs every operation case, and a few steps of a small model, once on the GPU: what compute-sanitizer looks at.

    compute-sanitizer --tool memcheck python tools/run_cuda_cases.py [WORD ...]

Cases whose name holds one of the words run, and the model if it is named or no word is given; each is printed before it
runs, so that the last line names what failed. Results are not compared with anything here: tests/test_operations.py and
tests/test_cuda.py do that.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from operation_cases import AWKWARD_CASES, CUDA_FUSED_CASES, Case
from reference import Runner, Shape, random_model

_MODEL = Shape(heads=14, kv_heads=2, head_size=64, hidden=128, intermediate=256, layers=2)


def run_case(case: Case, dtype: torch.dtype) -> None:
    """One run of one case."""
    inputs = case.make(torch.Generator().manual_seed(len(case.label)), dtype)
    case.run([tensor.to("cuda") for tensor in inputs])


def run_model() -> None:
    """A prefill, decode steps whose batches are padded and captured, and steps with indices out of range."""
    runner = Runner(_MODEL, random_model(_MODEL), torch.bfloat16, "cuda")
    runner.prefill([[1, 2, 3], [4], [5] * 33, [6] * 100, [7] * 17])
    for step in range(4):
        runner.decode({n: step + n for n in range(5) if (n + step) % 3})
    for position, value in ((0, 10**12), (1, -1), (5, 10**6), (6, 10**6)):
        inputs, parameters = runner.decode_inputs({0: 1, 1: 2})
        inputs[position].view(-1)[0] = value
        for _ in range(2):  # the second call raises what the first one found
            try:
                runner.decoder.execute(inputs, parameters)
            except ValueError as error:
                print(f"told: {error}")
                break
            torch.cuda.synchronize()
        else:
            raise SystemExit(f"nobody noticed {value} in input {position}")


def main() -> None:
    """Runs them all."""
    words = sys.argv[1:]
    cases = [
        case for case in (*AWKWARD_CASES, *CUDA_FUSED_CASES) if not words or any(word in str(case) for word in words)
    ]
    for case in cases:
        print(case, flush=True)
        run_case(case, torch.bfloat16)
        torch.cuda.synchronize()
    if not words or "model" in words:
        print("model", flush=True)
        run_model()
        torch.cuda.synchronize()
    print(f"{len(cases)} cases have run")


if __name__ == "__main__":
    main()
