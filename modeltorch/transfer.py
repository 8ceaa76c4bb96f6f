"""Small tensors on their way between the host and a device, without the one waiting for the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

_ALIGNMENT = 256


def upload(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copies of host tensors on a device; to a GPU in one copy that the host does not wait for."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    ends = list(accumulate(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors))
    starts = [0, *ends[:-1]]
    host = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)

    def part_of(memory: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
        return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)

    for start, tensor in zip(starts, tensors, strict=True):
        part_of(host, start, tensor).copy_(tensor)
    memory = host.to(device, non_blocking=True)
    return [part_of(memory, start, tensor) for start, tensor in zip(starts, tensors, strict=True)]


class Download:
    """Whole numbers on their way from a GPU to the host."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        self._host.copy_(numbers, non_blocking=True)
        self._copied: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record(torch.cuda.current_stream(numbers.device))

    def wait(self) -> list[int]:
        """Waits for them."""
        self._copied.synchronize()
        return [int(number) for number in self._host.tolist()]
