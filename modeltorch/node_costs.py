"""What each node of a step costs: the bytes it must move, its operations, and the time that torch's profiler sees.

Bytes and operations are counted from the text of an object's graph(), which names every node with the shapes of its
inputs and outputs. On a GPU nodes are timed one after the other, not as a captured graph replays them.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from modeltorch.bench import Workload
from modeltorch.limits import LinearRate, read_rate
from modeltorch.subject import Subject

STEPS = 5
"""Profiled steps of a workload; a node's time is their median."""

_ROOF_ROWS = 2048  # rows of the linears whose rate stands for what the device can multiply

_NODE = re.compile(r"^  (\S+) = (\w+)\((.*)\) ->(.*)$")
_VALUE = re.compile(r"(\S+) (\w+)\[([\d, ]*)\]")


@dataclass(frozen=True)
class _Value:
    """A tensor of a node as graph() prints it, "qkv bfloat16[8, 256]"."""

    name: str
    item_bytes: int
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of the whole tensor."""
        return self.item_bytes * prod(self.dims)

    @property
    def is_cache(self) -> bool:
        """Whether it is a key or value cache, of which a node touches some rows."""
        return self.name.endswith(("k_cache", "v_cache"))


def _values(text: str) -> list[_Value]:
    return [
        _Value(name, getattr(torch, dtype).itemsize, tuple(int(size) for size in dims.split(", ") if size))
        for name, dtype, dims in _VALUE.findall(text)
    ]


@dataclass(frozen=True)
class NodeCost:
    """A node of a step.

    Attributes:
        name: as graph() has it.
        operation: what it computes, "FusedLinear".
        moved: bytes that it must read and write at least: of a cache and of a table only the rows in use.
        flops: operations of its products; 0 where it has none.
    """

    name: str
    operation: str
    moved: int
    flops: int


def node_costs(graph: str, lengths: Sequence[int], is_prefill: bool) -> list[NodeCost]:
    """The nodes of a step.

    Args:
        graph: what graph() of the object says after it.
        lengths: tokens of each sequence, those of the step included.
        is_prefill: whether they are all of the step.
    """
    pairs = sum(length * (length + 1) // 2 for length in lengths) if is_prefill else sum(lengths)
    costs = []
    for line in graph.splitlines():
        found = _NODE.match(line)
        if not found:
            continue
        name, operation = found[1], found[2]
        inputs, outputs = _values(found[3]), _values(found[4])
        rows = sum(lengths) if any(value.name == "block_tables" for value in inputs) else inputs[0].dims[0]
        moved = sum(value.bytes for value in outputs)
        for value in inputs:
            if value.is_cache:
                moved += rows * prod(value.dims[2:]) * value.item_bytes
            elif operation == "GatherRows" and value is inputs[0]:
                moved += outputs[0].bytes
            else:
                moved += value.bytes
        flops = 0
        if "Linear" in operation:
            weights = [value for value in inputs if value.name.endswith(".weight") and len(value.dims) == 2]
            flops = 2 * inputs[0].dims[0] * sum(prod(weight.dims) for weight in weights)
        elif operation.endswith("Attention"):
            flops = 4 * pairs * outputs[0].dims[1]
        costs.append(NodeCost(name, operation, moved, flops))
    return costs


def _node_seconds(step: Callable[[], object], names: Collection[str], device: torch.device) -> dict[str, float]:
    """Median seconds of each node over some steps, in which it ran."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
    seconds: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events() or []:
        if event.name in names:
            seconds[event.name].append((event.device_time_total if on_gpu else event.cpu_time_total) / 1e6)
    return {name: statistics.median(times) for name, times in seconds.items()}


def check_device(device: torch.device) -> None:
    """Refuses a device whose nodes nothing times.

    Raises:
        NotImplementedError: it is neither a CPU nor a GPU.
    """
    if device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"the nodes of a step are timed on cpu and cuda, not on {device.type}")


def report(subject: Subject, workload: Workload) -> dict[str, Any]:
    """The nodes of a workload's step, under the keys that benchmarks/plot.py reads.

    Args:
        subject: the model, on a device that check_device lets pass.
        workload: one with a step.
    """
    model = subject.model
    read, multiply = read_rate(model.device), LinearRate(model, _ROOF_ROWS)
    assert read is not None
    assert workload.step is not None
    is_prefill = workload.name.startswith("prefill")
    with workload.step(2 * STEPS) as step:
        for _ in range(STEPS):
            step()
        made = model.acl_encoder_operation if is_prefill else model.acl_decoder_operation
        costs = node_costs(made.graph(), [workload.length] * workload.batch, is_prefill)
        seconds = _node_seconds(step, {cost.name for cost in costs}, model.device)
    for rate in (read, multiply):
        for _ in range(STEPS):
            rate.sample()
    nodes = [
        {
            "name": cost.name,
            "operation": cost.operation,
            "us": round(seconds[cost.name] * 1e6, 3),
            "bytes": cost.moved,
            "flops": cost.flops,
        }
        for cost in costs
    ]
    rates = {"read_gb_s": statistics.median(read.samples), "multiply_gflop_s": statistics.median(multiply.samples)}
    return subject.as_json() | {"workload": workload.name} | rates | {"nodes": nodes}
