"""Says in one file what an Ascend machine is, and what of this package works on it.

    python -m modeltorch.ascend_report [file]

Collects versions and environment, then compares every operation and a small random model on the NPU with the CPU,
in line and waiting for every node, so that a failure names its node, the vendor operation and its tensors. Each part
runs in a process of its own: one that crashes is a line of the report. docs/ascend.md says what to do with it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # torch must load where torch_npu does not

import torch

Tensors = list[torch.Tensor]

VARIABLES = (
    "ASCEND_HOME_PATH",
    "ATB_HOME_PATH",
    "LD_LIBRARY_PATH",
    "ASCEND_RT_VISIBLE_DEVICES",
    "ATB_OPERATION_EXECUTE_ASYNC",
    "TASK_QUEUE_ENABLE",
    "ASCEND_LAUNCH_BLOCKING",
    "PYTORCH_NPU_ALLOC_CONF",
)
PACKAGES = ("modeltorch", "torch", "torch_npu", "transformers")
TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2}
SECONDS = 600


def _command(*words: str) -> str:
    """What a command prints, or why it could not run."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    except OSError as error:
        return str(error)


def machine() -> Iterator[str]:
    """Versions and settings, a line each."""
    yield f"python {platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        try:
            yield f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{package} is not installed"
    for name in VARIABLES:
        yield f"{name}={os.environ.get(name, '')}"
    for home in ("ASCEND_HOME_PATH", "ATB_HOME_PATH"):
        folder = Path(os.environ.get(home, "/nowhere"))
        for file in [*folder.glob("*version*"), *folder.parent.parent.glob("version.info"), *folder.glob("*.info")]:
            if file.is_file():
                yield f"{file}: {' '.join(file.read_text(errors='replace').split())[:300]}"
    yield f"npu-smi info:\n{_command('npu-smi', 'info')}"


def _operations(dtype: torch.dtype) -> Iterator[tuple[str, str, dict[str, float], Tensors]]:
    """(label, operation, parameters, inputs) of every operation that can run alone."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    attention = {"heads": 4, "kv_heads": 2, "head_size": 64, "scale": 0.125}
    cache = normal(4, 128, 2, 64)
    tables = torch.tensor([[2, 1], [3, 0]], dtype=torch.int32)
    contexts = torch.tensor([200, 7], dtype=torch.int32)
    slots = torch.tensor([0, 130, 511], dtype=torch.int32)
    yield "RmsNorm", "RmsNorm", {"epsilon": 1e-6}, [normal(5, 256), normal(256)]
    yield "Add", "Add", {}, [normal(5, 256), normal(5, 256)]
    yield "GatherRows", "GatherRows", {}, [normal(9, 256), torch.tensor([8, 0, 3])]
    for transposed in (1, 0):
        weight = normal(128, 256) if transposed else normal(256, 128)
        layout = "[n, k]" if transposed else "[k, n]"
        parameters: dict[str, float] = {"transposed": transposed, "has_bias": 0, "parts": 1}
        yield f"Linear {layout}", "Linear", parameters, [normal(5, 256), weight]
        parameters = {"transposed": transposed, "has_bias": 1, "parts": 1}
        yield f"Linear {layout} with bias", "Linear", parameters, [normal(5, 256), weight, normal(128)]
    parts: dict[str, float] = {"transposed": 1, "has_bias": 0, "parts": 2}
    yield "Linear of two parts", "Linear", parts, [normal(5, 256), normal(128, 256), normal(64, 256)]
    heads = {key: attention[key] for key in ("heads", "kv_heads", "head_size")}
    yield "SplitQkv", "SplitQkv", heads, [normal(5, 512)]
    yield "SwiGlu", "SwiGlu", {}, [normal(5, 256)]
    lengths = torch.tensor([3, 130], dtype=torch.int32)
    qkv = [normal(133, count, 64) for count in (4, 2, 2)]
    yield "SelfAttention", "SelfAttention", attention, [*qkv, lengths]
    yield "ReshapeAndCache", "ReshapeAndCache", {}, [normal(3, 2, 64), normal(3, 2, 64), cache, cache.clone(), slots]
    yield "PagedAttention", "PagedAttention", attention, [normal(2, 4, 64), cache, cache.clone(), tables, contexts]


def _difference(npu: torch.Tensor, cpu: torch.Tensor) -> float:
    """Norm of the difference over the norm of the CPU's values."""
    return float((npu.double() - cpu.double()).norm() / cpu.double().norm())


def _verdict(label: str, dtype: torch.dtype, compute: Callable[[], float]) -> str:
    """A line that says how far the NPU is from the CPU, or how it failed."""
    name = f"{label} {str(dtype).removeprefix('torch.')}"
    try:
        error = compute()
    except Exception:
        return f"FAILED {name}\n{traceback.format_exc(limit=1)}"
    return f"{'ok' if error < TOLERANCE[dtype] else 'WRONG'} {name}: relative difference {error:.1e}"


def _dtypes() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]


def operations() -> Iterator[str]:
    """Every operation alone."""
    for dtype in _dtypes():
        for label, operation, parameters, inputs in _operations(dtype):
            step = torch.classes.ModelTorch.Operation(operation, parameters)

            def compute(step: Any = step, inputs: Tensors = inputs) -> float:
                there = [tensor.to("npu") for tensor in inputs]
                outputs = [output.cpu() for output in step.run(there)]
                here = step.run(inputs)
                if not here:  # it writes to its caches
                    outputs, here = [tensor.cpu() for tensor in there[2:4]], inputs[2:4]
                return max(_difference(npu, cpu) for npu, cpu in zip(outputs, here, strict=True))

            yield _verdict(label, dtype, compute)


SIZES = {"hidden": 256, "vocab": 1000, "intermediate": 512, "2*intermediate": 1024, "vocab or vocab + 1": 1000}
LAYERS, HEADS, KV_HEADS, HEAD_SIZE, BLOCK, BLOCKS = 2, 4, 2, 64, 128, 4


def _parameters(dtype: torch.dtype, is_prefill: bool) -> str:
    return json.dumps(
        {
            "isFA": False,
            "isPrefill": is_prefill,
            "isBF16": dtype == torch.bfloat16,
            "rmsNormEps": 1e-6,
            "numHiddenLayers": LAYERS,
            "numAttentionHeadsPerRank": HEADS,
            "numKeyValueHeadsPerRank": KV_HEADS,
            "hiddenSizePerAttentionHead": HEAD_SIZE,
            "packQuantType": [[1, 1]] * LAYERS,
        }
    )


class SmallModel:
    """A random Qwen2 of two layers on one device, a prefill and a decode object over one cache."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device = device
        generator = torch.Generator().manual_seed(1)
        cache = torch.zeros(BLOCKS, BLOCK, KV_HEADS, HEAD_SIZE, dtype=dtype)
        caches = [cache.clone().to(device) for _ in range(2 * LAYERS)]
        angles = torch.rand(256, HEAD_SIZE // 2, generator=generator).repeat(1, 2)
        self.tables = [angles.cos().to(dtype).to(device), angles.sin().to(dtype).to(device)]
        self.one = torch.ones(1, dtype=dtype).to(device)
        self.objects = {}
        weights: Tensors = []
        for is_prefill in (True, False):
            made = torch.classes.ModelTorch.ModelTorch("qwen_PAModel")
            made.set_param(_parameters(dtype, is_prefill))
            weights = weights or self._weights(json.loads(made.weight_spec()), dtype, generator)
            made.set_weight(weights)
            made.set_kv_cache(caches[0::2], caches[1::2])
            self.objects[is_prefill] = made

    def _weights(self, spec: list[dict[str, Any]], dtype: torch.dtype, generator: torch.Generator) -> Tensors:
        weights = [torch.zeros(1)] * (spec[-1]["slot"] + 1)
        for entry in spec:
            sizes = [SIZES[size] if isinstance(size, str) else size for size in entry["shape"]]
            scale = sizes[-1] ** -0.5 if len(sizes) == 2 else 1.0
            weights[entry["slot"]] = (torch.randn(sizes, generator=generator) * scale).to(dtype)
        return [weight.to(self.device) for weight in weights]

    def step(self, lengths: list[int], positions: list[int], slots: list[int], is_prefill: bool) -> torch.Tensor:
        """Logits of one step over made-up tokens."""
        ids = torch.tensor([(7 * slot + 3) % 1000 for slot in slots])
        rows = torch.arange(len(ids)) if is_prefill else torch.zeros(1)
        inputs = [
            ids,
            torch.tensor(positions),
            *self.tables,
            self.one,
            torch.tensor([[0], [1]], dtype=torch.int32),
            torch.tensor(slots, dtype=torch.int32),
            self.one,
            self.one,
            torch.tensor(lengths, dtype=torch.int32),
            rows,
            self.one,
        ]
        on_device = [tensor.to(self.device) for tensor in inputs]
        logits: torch.Tensor = self.objects[is_prefill].execute(on_device, json.dumps({"seqLen": lengths}))[0]
        return logits.cpu()


def model() -> Iterator[str]:
    """A small model: a prefill of two sequences and two decode steps."""
    steps = [
        ("prefill", [5, 100], [*range(5), *range(100)], [*range(5), *range(BLOCK, BLOCK + 100)], True),
        ("first decode", [6, 101], [5, 100], [5, BLOCK + 100], False),
        ("second decode", [7, 102], [6, 101], [6, BLOCK + 101], False),
    ]
    for dtype in _dtypes():
        pair: list[SmallModel] = []
        for label, lengths, positions, slots, is_prefill in steps:

            def compute(
                dtype: torch.dtype = dtype,
                pair: list[SmallModel] = pair,
                step: tuple[list[int], list[int], list[int], bool] = (lengths, positions, slots, is_prefill),
            ) -> float:
                if not pair:
                    pair.extend(SmallModel(device, dtype) for device in ("npu", "cpu"))
                npu, cpu = (side.step(*step) for side in pair)
                return _difference(npu, cpu)

            yield _verdict(label, dtype, compute)
        if pair:
            yield pair[0].objects[False].graph()


PARTS: dict[str, Callable[[], Iterator[str]]] = {"operations": operations, "model": model}


def _part(name: str) -> str:
    """Runs one part in a process of its own; what it printed."""
    environment = {**os.environ, "ASCEND_LAUNCH_BLOCKING": "1", "MODELTORCH_TRACE": "1" if name == "model" else "0"}
    words = [sys.executable, "-m", "modeltorch.ascend_report", "--part", name]
    try:
        ran = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env=environment,
            cwd=Path(__file__).parents[1],  # the package that this file is of
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"FAILED {name}: no end after {SECONDS} s"
    ended = "" if ran.returncode == 0 else f"FAILED {name}: the process ended with {ran.returncode}\n"
    return f"{ran.stdout}{ended}--- what it wrote beside (the last line of a crash is the node that ran)\n{ran.stderr}"


def main() -> int:
    """Writes the report; 1 if anything failed or is wrong."""
    parser = argparse.ArgumentParser(description="Say what an Ascend machine is, and what works on it.")
    parser.add_argument("file", nargs="?", default="ascend_report.txt", type=Path)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        import torch_npu  # noqa: F401  device npu

        import modeltorch  # noqa: F401  registers torch.classes.ModelTorch

        for line in PARTS[arguments.part]():
            print(line, flush=True)
        return 0
    text = "\n".join(["== machine", *machine(), *(f"== {name}\n{_part(name)}" for name in PARTS)])
    arguments.file.write_text(text)
    verdicts = [line for line in text.splitlines() if line.startswith(("ok ", "WRONG ", "FAILED "))]
    for line in verdicts:
        print(line)
    failed = [line for line in verdicts if not line.startswith("ok ")]
    print(f"{len(verdicts) - len(failed)} of {len(verdicts)} work; the report is {arguments.file}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
