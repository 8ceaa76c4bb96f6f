"""What a step is measured against: the bytes that it cannot avoid, its operations, over rates of this machine.

The rates are references measured in the same run, not bounds. Memory is read by a probe of our own, and the linears are
multiplied by torch's library. A step may exceed them: on a machine that others use too, where its weights stay in the
caches, or where its kernels are better than torch's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM

_READ_SAMPLE_BYTES = 250_000_000  # several times the caches; no power of two, which would put streams on one bank
_GPU_READ_SAMPLE_BYTES = 2 * 2**30
_TIMES_THE_CACHE = 4  # a step of so many times the last cache reads nearly all of it from memory


def last_level_cache(folder: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of all the caches of the last level that the processor has; 0 where Linux does not say."""
    sizes: dict[int, dict[str, int]] = {}
    for cache in folder.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, shared, size = ((cache / name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
            sizes.setdefault(int(level), {})[shared] = int(size.removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    return sum(sizes[max(sizes)].values()) if sizes else 0


@dataclass(frozen=True)
class Limit:
    """A reference rate, and what part of it a workload's median reached.

    Attributes:
        rate: measured in the same run, in `unit`.
        unit: "GB/s" or "GFLOP/s".
        fraction: the workload's own rate over it; above 1 where the workload was faster than the reference.
    """

    rate: float
    unit: str
    fraction: float


def _linear_shapes(model: FlashQwen2ForCausalLM) -> list[tuple[int, int]]:
    """[n, k] of the four linears of a layer."""
    q_size = model.num_heads * model.head_size
    kv_size = model.num_kv_heads * model.head_size
    inter = model.config.intermediate_size
    hidden = model.hidden_size
    return [(q_size + 2 * kv_size, hidden), (hidden, q_size), (2 * inter, hidden), (hidden, inter)]


def decode_bytes(model: FlashQwen2ForCausalLM, batch: int, context: int) -> int:
    """Bytes that a decode step must read: every weight once, and keys and values; of the embedding nothing."""
    layer = sum(n * k for n, k in _linear_shapes(model))
    weights = model.num_layers * layer + model.vocab_size * model.hidden_size
    cache = 2 * model.num_layers * batch * context * model.num_kv_heads * model.head_size
    return (weights + cache) * model.dtype.itemsize


def prefill_flops(model: FlashQwen2ForCausalLM, lengths: Sequence[int]) -> int:
    """Operations of a prefill: linears, causal attention, and the lm_head for one row a sequence.

    What lies behind the attention of the last layer is counted for those rows, too, since no others are computed there.
    """
    qkv, *others = (n * k for n, k in _linear_shapes(model))
    rows = sum(lengths)
    linears = 2 * (rows * model.num_layers * qkv + (rows * (model.num_layers - 1) + len(lengths)) * sum(others))
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    attention = 4 * pairs * model.num_heads * model.head_size * model.num_layers
    return linears + attention + 2 * len(lengths) * model.vocab_size * model.hidden_size


@dataclass
class ReadRate:
    """Samples of how fast this machine reads memory, taken between timed steps."""

    samples: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._probe = torch.classes.ModelTorch.ReadProbe(_READ_SAMPLE_BYTES)
        self._cache_bytes = last_level_cache()

    def sample(self) -> None:
        """Reads the sample once with every thread."""
        self.samples.append(_READ_SAMPLE_BYTES / self._probe.seconds() / 1e9)

    def rate(self) -> float:
        """The median of the samples, in GB/s."""
        return statistics.median(self.samples)

    def limit(self, moved: int, seconds: float) -> Limit | None:
        """For a step that moves so many bytes in so much time; None where much of them may come from the caches."""
        if moved < _TIMES_THE_CACHE * self._cache_bytes:
            return None
        return Limit(self.rate(), "GB/s", moved / seconds / 1e9 / self.rate())


class GpuReadRate(ReadRate):
    """The same for the memory of a GPU, beside the timed steps: the sum of a large tensor, in GPU time."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __post_init__(self) -> None:
        self._cache_bytes = 0

    def sample(self) -> None:
        """Reads the sample several times and keeps the fastest."""
        memory = torch.randn(_GPU_READ_SAMPLE_BYTES // 4, device=self._device)
        seconds = min(_gpu_seconds(memory.sum) for _ in range(5))
        self.samples.append(_GPU_READ_SAMPLE_BYTES / seconds / 1e9)

    def limit(self, moved: int, seconds: float) -> Limit | None:
        """See ReadRate."""
        if moved < _TIMES_THE_CACHE * torch.cuda.get_device_properties(self._device).L2_cache_size:
            return None
        return Limit(self.rate(), "GB/s", moved / seconds / 1e9 / self.rate())


def _gpu_seconds(body: Callable[[], object]) -> float:
    """Seconds that the GPU takes for what `body` launches."""
    start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    body()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def read_rate(device: torch.device) -> ReadRate | None:
    """What measures how fast a device reads its memory; None where nothing does."""
    return ReadRate() if device.type == "cpu" else GpuReadRate(device) if device.type == "cuda" else None


def linear_rate(model: FlashQwen2ForCausalLM, rows: int) -> LinearRate | None:
    """What measures how fast torch's own library multiplies on a model's device; None where nothing does."""
    return LinearRate(model, rows) if model.device.type in ("cpu", "cuda") else None


class LinearRate:
    """Samples of how fast torch's own library multiplies the model's linears at a number of rows."""

    def __init__(self, model: FlashQwen2ForCausalLM, rows: int) -> None:
        self._flops = 2 * rows * sum(n * k for n, k in _linear_shapes(model))
        self._on_gpu = model.device.type == "cuda"

        def normal(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, device=model.device).to(model.dtype)

        self._pairs = [(normal(rows, k), normal(n, k)) for n, k in _linear_shapes(model)]
        self.samples: list[float] = []

    def sample(self) -> None:
        """Multiplies the linears of one layer, twice, and keeps the faster time."""
        seconds = []
        for _ in range(2):
            if self._on_gpu:
                seconds.append(_gpu_seconds(self._multiply))
                continue
            start = time.perf_counter()
            self._multiply()
            seconds.append(time.perf_counter() - start)
        self.samples.append(self._flops / min(seconds) / 1e9)

    def _multiply(self) -> None:
        for x, weight in self._pairs:
            torch.nn.functional.linear(x, weight)

    def limit(self, flops: int, seconds: float) -> Limit:
        """For a step of so many operations in so much time."""
        rate = statistics.median(self.samples)
        return Limit(rate, "GFLOP/s", flops / seconds / 1e9 / rate)
