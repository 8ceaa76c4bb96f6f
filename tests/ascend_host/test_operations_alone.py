"""Every operation alone: what the vendor's operations are given makes them compute what our CPU kernels do."""

from __future__ import annotations

import pytest
import torch
from operation_cases import AWKWARD_CASES, Case
from stand_in import IS_OLD_CHIP, count
from test_operations import TOLERANCE, relative_error

import modeltorch  # noqa: F401  registers torch.classes.ModelTorch

NOT_ALONE = ("Rope", "AddRmsNorm", "ArgmaxRows")
"""Rope needs the lengths that the attention after it has; the fused norm and the argmax are not built on Ascend."""

CASES = [case for case in AWKWARD_CASES if case.operation not in NOT_ALONE]


def tiles_fit(case: Case, inputs: list[torch.Tensor]) -> bool:
    """False for caches that cannot be cut into tiles of 16 columns."""
    caches = [tensor for tensor in inputs if tensor.dim() == 4]
    return not IS_OLD_CHIP or all(cache.shape[2] * cache.shape[3] % 16 == 0 for cache in caches)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operation_equals_float64(case: Case, dtype: torch.dtype) -> None:
    inputs = case.make(torch.Generator().manual_seed(len(case.label)), dtype)
    exact = case.exact([tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs])
    if not tiles_fit(case, inputs):
        pytest.skip("kv_heads * head_size is no multiple of 16")
    if IS_OLD_CHIP and case.operation == "PagedAttention":
        pytest.skip("a cache in tiles is written by ReshapeAndCache alone: test_model.py runs both")
    if IS_OLD_CHIP and case.operation == "ReshapeAndCache":
        pytest.skip("the cache lies in tiles")
    ran = count("operations")
    outputs = case.run([tensor.to("npu") for tensor in inputs])
    assert len(outputs) == len(exact)
    for output, expected in zip(outputs, exact, strict=True):
        assert output.shape == expected.shape
        assert output.dtype == dtype
        if expected.numel() and expected.abs().max() > 0:
            assert relative_error(output.cpu(), expected) < TOLERANCE[dtype]
    assert (count("operations") > ran) == all(tensor.numel() > 0 for tensor in inputs)


@pytest.mark.parametrize(
    ("operation", "calls"),
    [("RmsNorm", {"RmsNorm": 1}), ("Add", {"Elewise": 1}), ("GatherRows", {"Gather": 1}), ("SplitQkv", {"Split": 1})],
)
def test_operation_is_one_of_the_vendor(operation: str, calls: dict[str, int]) -> None:
    case = [case for case in CASES if case.operation == operation][1]  # the first of a table may be empty
    inputs = [tensor.to("npu") for tensor in case.make(torch.Generator().manual_seed(0), torch.float16)]
    before = {name: count(f"{name}Operation") for name in calls}
    case.run(inputs)
    assert {name: count(f"{name}Operation") - before[name] for name in calls} == calls


def test_parts_of_a_linear_are_joined() -> None:
    case = next(case for case in CASES if case.operation == "Linear" and "parts3" in case.label and "m3" in case.label)
    inputs = [tensor.to("npu") for tensor in case.make(torch.Generator().manual_seed(0), torch.float16)]
    before = count("LinearOperation"), count("ConcatOperation")
    case.run(inputs)
    assert (count("LinearOperation") - before[0], count("ConcatOperation") - before[1]) == (3, 2)


def test_swiglu_is_split_on_chips_without_the_fused_one() -> None:
    gate_up = torch.randn(3, 32).half().to("npu")
    before = count("SplitOperation"), count("ElewiseOperation")
    torch.classes.ModelTorch.Operation("SwiGlu", {}).run([gate_up])
    used = count("SplitOperation") - before[0], count("ElewiseOperation") - before[1]
    assert used == ((1, 1) if IS_OLD_CHIP else (0, 0))


def test_float32_is_refused() -> None:
    inputs = [torch.randn(2, 4).to("npu"), torch.randn(4).to("npu")]
    with pytest.raises(NotImplementedError, match="float16 or bfloat16, got float32"):
        torch.classes.ModelTorch.Operation("RmsNorm", {"epsilon": 1e-6}).run(inputs)


def test_bf16_is_refused_where_the_chip_has_none() -> None:
    inputs = [torch.randn(2, 4).bfloat16().to("npu"), torch.randn(4).bfloat16().to("npu")]
    norm = torch.classes.ModelTorch.Operation("RmsNorm", {"epsilon": 1e-6})
    if not IS_OLD_CHIP:
        norm.run(inputs)
        return
    with pytest.raises(NotImplementedError, match="has no bfloat16: load the model as float16"):
        norm.run(inputs)


def test_an_address_between_the_vendors_steps_is_refused() -> None:
    x = torch.randn(2 * 64 + 8).half().to("npu")[3 : 3 + 128].view(2, 64)
    with pytest.raises(ValueError, match="must begin at a multiple of 32 bytes"):
        torch.classes.ModelTorch.Operation("RmsNorm", {"epsilon": 1e-6}).run([x, torch.ones(64).half().to("npu")])
