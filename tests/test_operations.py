"""Every operation against float64 on awkward shapes, on every device and dtype."""

from __future__ import annotations

import math

import pytest
import torch
from operation_cases import AWKWARD_CASES, CPU_FUSED_CASES, CUDA_FUSED_CASES, Case
from reference import DEVICES, DTYPES, relative_error

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", AWKWARD_CASES, ids=str)
def test_operation_equals_float64(case: Case, dtype: torch.dtype, device: str) -> None:
    check(case, dtype, device)


FUSED = [
    (case, dtype, device)
    for device, cases in (("cpu", CPU_FUSED_CASES), ("cuda", CUDA_FUSED_CASES))
    for case in cases
    for dtype in DTYPES
    if device in DEVICES
]


@pytest.mark.parametrize(("case", "dtype", "device"), FUSED, ids=str)
def test_fused_operation_equals_float64(case: Case, dtype: torch.dtype, device: str) -> None:
    check(case, dtype, device)


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    """Runs a case on a device and compares it with float64."""
    inputs = case.make(torch.Generator().manual_seed(len(case.label)), dtype)
    exact = case.exact([tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs])
    outputs = case.run([tensor.to(device) for tensor in inputs])
    assert len(outputs) == len(exact)
    for output, expected in zip(outputs, exact, strict=True):
        assert output.shape == expected.shape
        if not expected.is_floating_point():
            assert torch.equal(output.cpu(), expected)
            continue
        assert output.dtype == dtype
        if expected.numel() and expected.abs().max() > 0:
            assert relative_error(output.cpu(), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_argmax_follows_torch_on_what_is_not_finite(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(8, 700, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1] = -math.inf
    x[2, [600, 650]] = math.inf
    x[3, [300, 310]] = math.nan
    x[4, 699] = math.nan
    x[5] = -x[5].abs() - 1
    x[6, 695] = math.nan  # in the part of the row that fills no vector
    x[7] = x[7].abs().neg().clamp(max=-1)
    x[7, [100, 200]] = torch.tensor([-0.0, 0.0], dtype=dtype)  # equal: the first counts
    output = torch.classes.ModelTorch.Operation("ArgmaxRows", {}).run([x.to(device)])[0]
    assert output.tolist() == x.argmax(dim=1).tolist()


@pytest.mark.parametrize("name", ["Linear", "LinearSwiGlu"])
def test_a_linear_of_no_columns_gives_zeros(name: str) -> None:
    operation = torch.classes.ModelTorch.Operation(name, {"transposed": 1.0, "has_bias": 0.0, "parts": 1.0})
    (y,) = operation.run([torch.zeros(9, 0).bfloat16(), torch.zeros(64, 0).bfloat16()])
    assert torch.equal(y, torch.zeros(9, 64 if name == "Linear" else 32).bfloat16())


@pytest.mark.parametrize("gate", [-1e20, -3e38])
def test_a_gate_that_is_shut_lets_nothing_through(gate: float) -> None:
    operation = torch.classes.ModelTorch.Operation("LinearSwiGlu", {"transposed": 1.0, "has_bias": 0.0, "parts": 1.0})
    weight = torch.tensor([[gate, 0.0]] * 32 + [[0.0, 1e20]] * 32).bfloat16()
    (y,) = operation.run([torch.ones(9, 2).bfloat16(), weight])
    assert torch.equal(y, torch.zeros(9, 32).bfloat16())


def test_an_operation_can_run_again_with_other_shapes() -> None:
    norm = torch.classes.ModelTorch.Operation("RmsNorm", {"epsilon": 1e-6})
    for rows, size in [(2, 8), (3, 8), (2, 8), (1, 5)]:
        x = torch.randn(rows, size)
        expected = torch.nn.functional.rms_norm(x, (size,), eps=1e-6)
        torch.testing.assert_close(norm.run([x, torch.ones(size)])[0], expected)


HEADS = {"heads": 2, "kv_heads": 2, "head_size": 4, "scale": 1.0}
ROWS = [torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)]
QKV = [*ROWS, torch.zeros(2, 2, 4)]
CACHES = [torch.zeros(2, 2, 2, 4), torch.zeros(2, 2, 2, 4)]


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "parameters", "inputs", "message"),
    [
        ("Nothing", {}, [], "known names: .*RmsNorm"),
        ("RmsNorm", {}, [], "epsilon is required"),
        ("RmsNorm", {"epsilon": 1e-6}, [], "at least one input"),
        ("RmsNorm", {"epsilon": 1e-6}, [torch.zeros(2, 4)], "expected 2 inputs, got 1"),
        ("RmsNorm", {"epsilon": 1e-6}, [torch.zeros(2, 4), torch.zeros(3)], r"gamma must be float32\[4\]"),
        ("RmsNorm", {"epsilon": 1e-6}, [torch.zeros(4, 2).t(), torch.zeros(4)], "contiguous"),
        ("SwiGlu", {}, [torch.zeros(1, 3)], "even number of columns"),
        ("ArgmaxRows", {}, [torch.zeros(2, 0)], "at least one column"),
        ("SplitQkv", {"heads": 2, "kv_heads": 0, "head_size": 4}, [torch.zeros(1, 8)], "kv_heads must be a whole"),
        ("SelfAttention", {**HEADS, "heads": 3}, [], "heads must be a multiple of kv_heads, got 3 and 2"),
        ("SelfAttention", {**HEADS, "head_size": 1.5}, [], r"head_size must be a whole number in .*, got 1.5"),
        ("Linear", {"transposed": 1, "has_bias": 0, "parts": -1}, [], "parts must be a whole number"),
        ("GatherRows", {}, [torch.zeros(4, 2), torch.tensor([0, 4])], r"indices holds 4 at 1, outside \[0, 4\)"),
        ("GatherRows", {}, [torch.zeros(4, 2), torch.tensor([-1])], "indices holds -1"),
        ("ReshapeAndCache", {}, [*ROWS, *CACHES, int32(4, -1)], r"slots holds 4 at 0, outside \[-1, 4\)"),
        ("SelfAttention", HEADS, [*QKV, int32(3)], "seq_len"),
        ("SelfAttention", HEADS, [*QKV, int32(1)], "add up to the 2 tokens"),
        ("PagedAttention", HEADS, [QKV[0], *CACHES, int32(0, 1).view(2, 1), int32(2, 3)], "seq_len holds 3 at 1"),
        ("PagedAttention", HEADS, [QKV[0], *CACHES, int32(0, 2).view(2, 1), int32(2, 1)], "block_tables holds 2"),
    ],
)
def test_bad_use_of_an_operation_is_told(name, parameters, inputs, message) -> None:
    with pytest.raises(ValueError, match=message):
        torch.classes.ModelTorch.Operation(name, parameters).run(inputs)
