"""set_weight: it takes the bytes that the tensors hold now, and all of them or nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from reference import Layout, Shape, parameters, random_model, tables, weight_list

SHAPE = Shape(vocab=160)
LAYOUT = Layout()


def made(dtype: torch.dtype) -> tuple[torch.ScriptObject, list[torch.Tensor]]:
    """A prefill object that knows its parameters, and weights for it."""
    model = torch.classes.ModelTorch.ModelTorch(LAYOUT.model_name)
    model.set_param(json.dumps(parameters(SHAPE, LAYOUT, dtype, True)))
    return model, weight_list(json.loads(model.weight_spec()), random_model(SHAPE), LAYOUT, dtype)


def caches(dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.zeros(2, 16, SHAPE.kv_heads, SHAPE.head_size, dtype=dtype) for _ in range(SHAPE.layers)]


def logits(model: torch.ScriptObject, dtype: torch.dtype) -> torch.Tensor:
    one = torch.ones(1, dtype=dtype)
    ints = [torch.zeros(1, 1, dtype=torch.int32), torch.arange(3, dtype=torch.int32)]
    inputs = [torch.tensor([1, 2, 3]), torch.arange(3), *tables(SHAPE, dtype), one, *ints, one, one]
    inputs += [torch.tensor([3], dtype=torch.int32), torch.tensor([2]), one]
    return model.execute(inputs, json.dumps({"seqLen": [3]}))[0].float()


def write_in_place(head: torch.Tensor) -> None:
    head.mul_(2)


def write_through_data(head: torch.Tensor) -> None:
    head.data.mul_(2)


def write_through_numpy(head: torch.Tensor) -> None:
    head.view(torch.int32 if head.dtype == torch.float32 else torch.int16).numpy()[:] = 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("write", [write_in_place, write_through_data, write_through_numpy])
@pytest.mark.parametrize("is_inference", [False, True])
def test_weights_set_again_are_those_of_now(dtype: torch.dtype, write: Callable, is_inference: bool) -> None:
    first, weights = made(dtype)
    second = made(dtype)[0]
    with torch.inference_mode(is_inference):
        weights = [weight.clone() for weight in weights]
    for model in (first, second):
        model.set_weight(weights)
        model.set_kv_cache(caches(dtype), caches(dtype))
    before = logits(first, dtype)
    with torch.inference_mode(is_inference):
        write(weights[-1])
    for model in (first, second):
        model.set_weight(weights)
    fresh = made(dtype)[0]
    fresh.set_weight([weight.clone() for weight in weights])
    fresh.set_kv_cache(caches(dtype), caches(dtype))
    expected = logits(fresh, dtype)
    assert not torch.equal(before, expected)
    assert torch.equal(logits(first, dtype), expected)
    assert torch.equal(logits(second, dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_are_refused_late_change_nothing(dtype: torch.dtype) -> None:
    model, weights = made(dtype)
    model.set_weight(weights)
    with pytest.raises(NotImplementedError, match="meta"):
        model.set_weight([weight.to("meta") for weight in weights])
    assert model.progress() == 1.0
    other = made(dtype)[0]
    other.set_weight(weights)
    for each in (model, other):
        each.set_kv_cache(caches(dtype), caches(dtype))
    assert torch.equal(logits(model, dtype), logits(other, dtype))


OUT_OF_MEMORY = """
import json, resource
import torch
import test_set_weight as shared
from reference import Shape

shared.SHAPE = Shape(vocab=160, hidden=512, intermediate=65536, layers=1)
model, weights = shared.made(torch.bfloat16)
model.set_weight(weights)
model.set_kv_cache(shared.caches(torch.bfloat16), shared.caches(torch.bfloat16))
before = shared.logits(model, torch.bfloat16)
weights[-1].mul_(2)
weights = [weight + 1 for weight in weights]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), resource.RLIM_INFINITY))
try:
    model.set_weight(weights)
except RuntimeError as error:
    assert "out of memory" in str(error), error
else:
    raise AssertionError("nothing was refused")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
del weights
assert torch.equal(shared.logits(model, torch.bfloat16), before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory through Linux")
def test_memory_that_runs_out_while_packing_changes_nothing() -> None:
    if torch.ops.ModelTorch.cpu_level() == "generic":
        pytest.skip("this processor level packs nothing")
    path = [str(entry) for entry in sys.path]
    code = f"import sys; sys.path[:] = {path!r}\n{OUT_OF_MEMORY}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
