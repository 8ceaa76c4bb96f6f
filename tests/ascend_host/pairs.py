"""The same model on the NPU and on the CPU."""

from __future__ import annotations

import torch
from reference import Runner, Shape, random_model, relative_error

CPU_TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Both sides round every intermediate to the same type; only the order of float32 sums differs, which now and then
turns the last bit of one."""


class Pair:
    """The same model, cache layout and prompts on the NPU and on the CPU."""

    def __init__(self, shape: Shape, dtype: torch.dtype, *arguments) -> None:
        model = random_model(shape, arguments[-1] if arguments else 0)
        self.npu, self.cpu = (Runner(shape, model, dtype, device, *arguments) for device in ("npu", "cpu"))

    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        return self.same(self.npu.prefill(prompts), self.cpu.prefill(prompts))

    def decode(self, new_tokens: dict[int, int]) -> torch.Tensor:
        return self.same(self.npu.decode(new_tokens), self.cpu.decode(new_tokens))

    def same(self, npu: torch.Tensor, cpu: torch.Tensor) -> torch.Tensor:
        assert relative_error(npu, cpu) < CPU_TOLERANCE[npu.dtype]
        return npu
