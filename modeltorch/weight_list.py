"""A checkpoint's tensors as the weight list of set_weight, and how far loading is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

_POLL_SECONDS = 0.1  # between two looks at how far packing is


def weight_list(
    specs: Sequence[Mapping[str, Any]],
    tensors: Mapping[str, torch.Tensor],
    sizes: Mapping[str, int],
    is_tied: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> list[torch.Tensor]:
    """The list in slot order, as the C++ side describes it; unused slots hold one element.

    Args:
        specs: weight_spec() of the object, an entry for each slot in use, in order.
        tensors: the checkpoint's tensors by name.
        sizes: of the names that stand for a size in a spec's shape.
        is_tied: the head is the embedding.
        dtype: of the result; a tensor of this dtype is not copied on the CPU.
        device: of the result.

    Raises:
        ValueError: the checkpoint lacks a tensor, or one has another shape than the configuration says.
    """
    weights = [torch.zeros(1, dtype=torch.float16)] * (specs[-1]["slot"] + 1)
    for spec in _with_progress(specs):
        name = spec["checkpoint"]
        if name == "lm_head.weight" and is_tied:
            weights[spec["slot"]] = weights[0]
            continue
        if name not in tensors:
            raise ValueError(f"the checkpoint lacks the tensor {name}")
        tensor = tensors[name]
        expected = [sizes[size] if isinstance(size, str) else size for size in spec["shape"]]
        if list(tensor.shape) != expected:
            raise ValueError(f"{name} must be {expected} by the checkpoint's configuration, got {list(tensor.shape)}")
        weights[spec["slot"]] = tensor.to(dtype).to(device)
    if device.type == "cuda":
        _put_side_by_side(weights, {spec["name"]: spec["slot"] for spec in specs})
    return weights


def _put_side_by_side(weights: list[torch.Tensor], slots: Mapping[str, int]) -> None:
    """Lays the parts of a linear (q, k, v; gate, up) behind each other in memory: the GPU multiplies them as one.

    Each stays a tensor of its own, a view. Nothing is packed elsewhere: the CPU packs while it loads.
    """
    for first in [name for name in slots if ".attn.q." in name or ".mlp.gate." in name]:
        others = ("attn.q", "attn.k", "attn.v") if ".attn.q." in first else ("mlp.gate", "mlp.up")
        names = [first.replace(others[0], other) for other in others]
        parts = [weights[slots[name]] for name in names]
        views = torch.split(torch.cat(parts), [part.shape[0] for part in parts])
        for name, view in zip(names, views, strict=True):
            weights[slots[name]] = view


def _with_progress(specs: Sequence[Mapping[str, Any]]) -> Any:
    """The weights to load, with a progress bar on a terminal where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return specs
    return tqdm(specs, desc="weights", unit="tensor", disable=None, leave=False)


@contextlib.contextmanager
def packing_shown(progress: Callable[[], float]) -> Iterator[None]:
    """A second bar, for as long as an object packs its weights; `progress` tells the part that is done."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield
        return
    with tqdm(total=100, desc="packing", unit="%", disable=None, leave=False) as bar:
        if bar.disable:
            yield
            return
        done = threading.Event()

        def show() -> None:
            while not done.wait(_POLL_SECONDS):
                bar.update(round(100 * progress()) - bar.n)

        watcher = threading.Thread(target=show, name="packing", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
