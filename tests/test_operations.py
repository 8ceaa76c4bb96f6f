"""Every operation against float64 on awkward shapes, on every device and dtype."""

from __future__ import annotations

import pytest
import torch
from operation_cases import AWKWARD_CASES, FUSED_CASES, Case
from reference import DEVICES, DTYPES, relative_error

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", AWKWARD_CASES, ids=str)
def test_operation_equals_float64(case: Case, dtype: torch.dtype, device: str) -> None:
    check(case, dtype, device)


@pytest.mark.parametrize("device", [device for device in DEVICES if device == "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FUSED_CASES, ids=str)
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
        assert output.dtype == dtype
        if expected.numel() and expected.abs().max() > 0:
            assert relative_error(output.cpu(), expected) < TOLERANCE[dtype]


def test_an_operation_can_run_again_with_other_shapes() -> None:
    norm = torch.classes.ModelTorch.Operation("RmsNorm", {"epsilon": 1e-6})
    for rows, size in [(2, 8), (3, 8), (2, 8), (1, 5)]:
        x = torch.randn(rows, size)
        expected = torch.nn.functional.rms_norm(x, (size,), eps=1e-6)
        torch.testing.assert_close(norm.run([x, torch.ones(size)])[0], expected)


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
    ],
)
def test_bad_use_of_an_operation_is_told(name, parameters, inputs, message) -> None:
    with pytest.raises(ValueError, match=message):
        torch.classes.ModelTorch.Operation(name, parameters).run(inputs)
