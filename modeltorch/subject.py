"""What is measured: a model, the sources it comes from and the machine it runs on."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from modeltorch import shapes
from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM


def _accelerator(device: torch.device) -> Any | None:
    """The module of torch for a device beside the processor (torch.cuda, torch.npu); None for the processor."""
    return None if device.type == "cpu" else getattr(torch, device.type)


def synchronise(device: torch.device) -> None:
    """Waits until a device has done what it was given."""
    accelerator = _accelerator(device)
    if accelerator is not None:
        accelerator.synchronize(device)


@cache
def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return run.stdout.strip().splitlines()[0] if run.stdout.strip() else "unknown"


def hardware(device: torch.device) -> str:
    """What the figures were taken on, for example "AMD EPYC, 2 threads, avx512"."""
    accelerator = _accelerator(device)
    if accelerator is not None:
        name = str(accelerator.get_device_name(device))
        return f"{name}, driver {_driver()}" if device.type == "cuda" else name
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{name}, {torch.get_num_threads()} threads, {torch.ops.ModelTorch.cpu_level()}"


@cache
def _commit() -> str:
    """What was measured: MODELTORCH_COMMIT, for sources that travelled without their history, or what git says."""
    told = os.environ.get("MODELTORCH_COMMIT")
    if told:
        return told
    folder = Path(__file__).parent
    run = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or "unknown"


@dataclass(frozen=True)
class Subject:
    """The model under measurement."""

    name: str
    model: FlashQwen2ForCausalLM

    @classmethod
    def from_shape(cls, shape: str, device: str, dtype: str, **options: Any) -> Subject:
        """A model of a known shape with random weights.

        Raises:
            ValueError: the shape is not known.
        """
        if shape not in shapes.SHAPES:
            raise ValueError(f"--shape must be one of {', '.join(shapes.SHAPES)}, got {shape}")
        config = shapes.SHAPES[shape]
        weights = config.random_weights(getattr(torch, dtype), device)
        model = FlashQwen2ForCausalLM(config, weights, device=device, dtype=dtype, **options)
        model.init_ascend_weight()
        return cls(shape, model)

    @classmethod
    def from_checkpoint(cls, path: str, device: str, dtype: str, **options: Any) -> Subject:
        """A model from a checkpoint."""
        return cls(Path(path).name, FlashQwen2ForCausalLM.from_pretrained(path, device=device, dtype=dtype, **options))

    def as_json(self) -> dict[str, str]:
        """What is measured, and where."""
        return {
            "model": self.name,
            "device": self.model.device.type,
            "hardware": hardware(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "commit": _commit(),
            "torch": torch.__version__,
        }
