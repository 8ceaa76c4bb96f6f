"""Small tensors on their way between the host and a device, without the one waiting for the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def upload(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copies of host tensors on a device; to a GPU in one copy that the host does not wait for."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    # Wide elements first, so that every tensor begins on a multiple of its element's size.
    dtypes = sorted({tensor.dtype for tensor in tensors}, key=lambda dtype: -dtype.itemsize)
    of_dtype = {dtype: [tensor for tensor in tensors if tensor.dtype == dtype] for dtype in dtypes}
    bytes_of = [sum(tensor.nbytes for tensor in of_dtype[dtype]) for dtype in dtypes]
    host = torch.empty(sum(bytes_of), dtype=torch.uint8, pin_memory=True)
    for dtype, part in zip(dtypes, torch.split(host, bytes_of), strict=True):
        torch.cat([tensor.flatten() for tensor in of_dtype[dtype]], out=part.view(dtype))
    parts = torch.split(host.to(device, non_blocking=True), bytes_of)
    copies = {
        dtype: iter(torch.split(part.view(dtype), [tensor.numel() for tensor in of_dtype[dtype]]))
        for dtype, part in zip(dtypes, parts, strict=True)
    }
    return [next(copies[tensor.dtype]).view(tensor.shape) for tensor in tensors]


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
