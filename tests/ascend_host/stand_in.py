"""What tests tell the stand-in driver, and what they read from it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_LIBRARY = ctypes.CDLL("libascendcl.so")
_LIBRARY.ascend_host_count.restype = ctypes.c_int64
_LIBRARY.ascend_host_pending.restype = ctypes.c_int64
_LIBRARY.ascend_host_counters.restype = ctypes.c_int64

MODE = os.environ.get("ATB_OPERATION_EXECUTE_ASYNC", "0")
"""0, 1 or 2 as the library reads it."""

BLOCKING = os.environ.get("ASCEND_LAUNCH_BLOCKING") == "1"
"""True if execute also waits for the device."""

HAS_QUEUE = os.environ.get("TASK_QUEUE_ENABLE") != "0" and not BLOCKING
"""True if torch_npu has a task queue."""

IN_LINE = MODE == "0" or not HAS_QUEUE
"""True if execute returns after every launch."""

IS_OLD_CHIP = os.environ.get("ASCEND_HOST_SOC", "").startswith("Ascend310P")
"""True if the stand-in says that it is a chip without bfloat16, with tiled caches."""


def count(name: str) -> int:
    """A counter: operations, setups, violations, dead_memory, contexts, event_waits, events_destroyed_early, or the
    name of a vendor operation."""
    return _LIBRARY.ascend_host_count(name.encode())


def counters() -> dict[str, int]:
    """Every counter by name."""
    text = ctypes.create_string_buffer(1 << 16)
    length = _LIBRARY.ascend_host_counters(text, len(text))
    pairs = (line.split() for line in text.raw[:length].decode().splitlines())
    return {name: int(value) for name, value in pairs}


def inject(fault: str, *, skip: int = 0, times: int = 1) -> None:
    """Lets `skip` calls pass and the next `times` fail: malloc, setup, execute, kernel, event_record, event_wait or
    event_timeout."""
    _LIBRARY.ascend_host_inject(fault.encode(), ctypes.c_int64(skip), ctypes.c_int64(times))


def pending(fault: str) -> int:
    """Failures of `fault` that have not happened yet."""
    return _LIBRARY.ascend_host_pending(fault.encode())


def launch_mode() -> str:
    """How this run launches, by what the environment sets, and on which chip."""
    if BLOCKING:
        way = "ASCEND_LAUNCH_BLOCKING=1, in line and waiting for every node"
    elif not HAS_QUEUE:
        way = "TASK_QUEUE_ENABLE=0, in line without a task queue"
    else:
        way = f"ATB_OPERATION_EXECUTE_ASYNC={MODE}"
    if os.environ.get("PER_STREAM_QUEUE") == "1":
        way += ", one task queue a stream"
    return f"{way}, {os.environ.get('ASCEND_HOST_SOC', 'Ascend910B3')}"


@contextmanager
def held_back() -> Iterator[None]:
    """While it lasts, no stream begins another task: everything that was launched waits."""
    _LIBRARY.ascend_host_pause(1)
    try:
        yield
    finally:
        _LIBRARY.ascend_host_pause(0)


@contextmanager
def held_calls(*calls: str) -> Iterator[None]:
    """While it lasts, calls of the vendor's `setup` or `execute`, or of the driver's `cast`, do not return."""
    for call in calls:
        _LIBRARY.ascend_host_hold(call.encode(), 1)
    try:
        yield
    finally:
        for call in calls:
            _LIBRARY.ascend_host_hold(call.encode(), 0)


@contextmanager
def slow_streams(microseconds: int) -> Iterator[None]:
    """While it lasts, every task of a stream begins late, so that who does not synchronise is too early."""
    _LIBRARY.ascend_host_delay(ctypes.c_int64(microseconds))
    try:
        yield
    finally:
        _LIBRARY.ascend_host_delay(ctypes.c_int64(0))
