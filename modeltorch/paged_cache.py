"""The paged key and value cache: one pool of blocks a layer, shared by all sequences."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch

GIB = 2**30
DEFAULT_BLOCK_SIZE = 128
MAX_ROWS = 2**31 - 1
_EVERYTHING_GB = 2.0**33  # more than any address reaches


def available_memory() -> int:
    """Bytes of main memory that can be taken without swapping."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def free_memory(device: torch.device) -> int:
    """Bytes that a cache of unstated size may take on a device."""
    if device.type in ("cuda", "npu"):
        memory = getattr(torch, device.type)
        held = memory.memory_reserved(device) - memory.memory_allocated(device)
        return int((memory.mem_get_info(device)[0] + held) * 0.75)
    return min(4 * GIB, available_memory() // 4)


class PagedCache:
    """Blocks of cache rows for every layer, and the list of those that are free.

    Token p of a sequence that owns `blocks` lies in block blocks[p // block_size], row p % block_size; its slot is
    that block * block_size + that row (docs/contract.md, "Caches").

    Attributes:
        pairs: (key, value) of each layer, both [num_blocks, block_size, kv_heads, head_size].
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.check_sizes(block_size=block_size, num_blocks=num_blocks)
        shape = (num_blocks, block_size, kv_heads, head_size)
        self.block_size = block_size
        self.num_blocks = num_blocks
        # Uninitialised on purpose: rows that were never written are never read, and untouched pages cost nothing.
        try:
            self.pairs = [
                (torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
                for _ in range(num_layers)
            ]
        except RuntimeError as error:  # torch's only word for memory that is not there
            asked = 2 * num_layers * math.prod(shape) * dtype.itemsize
            raise ValueError(
                f"a cache of {num_blocks} blocks of {block_size} tokens takes {asked} bytes ({asked / GIB:.1f} GiB), "
                f"which {device} does not have: lower num_blocks or cache_gb"
            ) from error
        self._free = list(range(num_blocks - 1, -1, -1))

    @staticmethod
    def check_sizes(*, block_size: int, num_blocks: int | None = None, cache_gb: float | None = None) -> None:
        """Refuses sizes that no cache can have.

        Raises:
            ValueError: one of them is not a number, or out of range.
        """
        for name, count in (("block_size", block_size), ("num_blocks", num_blocks)):
            if count is None and name == "num_blocks":
                continue
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}")
        rows = block_size * (num_blocks or 1)
        if rows > MAX_ROWS:
            raise ValueError(
                f"a cache has at most {MAX_ROWS} rows, which slots count in 32 bits, got {num_blocks or 1} blocks of "
                f"{block_size}: lower num_blocks or block_size"
            )
        is_number = isinstance(cache_gb, (int, float)) and not isinstance(cache_gb, bool)
        if cache_gb is not None and not (is_number and 0 < cache_gb < math.inf):
            raise ValueError(f"cache_gb must be a positive number, got {cache_gb!r}")

    @staticmethod
    def blocks_for_memory(
        cache_gb: float | None,
        *,
        num_layers: int,
        block_size: int,
        kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        free_memory: int,
    ) -> int:
        """Number of blocks that fit cache_gb GiB, or free_memory bytes if that is None.

        Raises:
            ValueError: not even one block fits.
        """
        block_bytes = 2 * num_layers * block_size * kv_heads * head_size * dtype.itemsize
        budget = free_memory if cache_gb is None else int(min(cache_gb, _EVERYTHING_GB) * GIB)
        if budget < block_bytes:
            raise ValueError(
                f"a cache of {budget} bytes ({budget / GIB:.3f} GiB) does not hold one block of {block_size} tokens, "
                f"which takes {block_bytes}; raise cache_gb or lower block_size"
            )
        return min(budget // block_bytes, MAX_ROWS // block_size)

    @property
    def free_blocks(self) -> int:
        """Number of blocks that nobody owns."""
        return len(self._free)

    def blocks_needed(self, tokens: int) -> int:
        """Blocks that hold this many tokens of one sequence."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks.

        Raises:
            RuntimeError: fewer are free.
        """
        if count > len(self._free):
            raise RuntimeError(
                f"the cache is out of blocks: {count} needed, {len(self._free)} of {self.num_blocks} free"
            )
        return [self._free.pop() for _ in range(count)]

    def release(self, blocks: Iterable[int]) -> None:
        """Gives blocks back."""
        self._free.extend(blocks)
