"""One table of operation cases: the tests check each against float64, benchmarks/bench_ops.py times the large ones.

A case makes its inputs from a generator, computes the exact outputs in float64 from those same inputs, and counts
the bytes and floating-point operations of one run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Attributes:
        make: inputs from (generator, dtype).
        exact: the outputs in float64, from the inputs with every floating-point one in float64. For an operation
            that writes to its inputs, the inputs as they must be afterwards.
        written_inputs: indices of the inputs that the operation writes to, instead of having outputs.
        flops: floating-point operations of a run.
    """

    operation: str
    label: str
    make: Callable[[torch.Generator, torch.dtype], Tensors]
    exact: Callable[[Tensors], Tensors]
    parameters: dict[str, float] = field(default_factory=dict)
    written_inputs: tuple[int, ...] = ()
    flops: int = 0
    is_benchmark: bool = False

    def __str__(self) -> str:
        return f"{self.operation}[{self.label}]"

    def run(self, inputs: Tensors) -> Tensors:
        """What the operation computes."""
        outputs = torch.classes.ModelTorch.Operation(self.operation, self.parameters).run(inputs)
        return [inputs[index] for index in self.written_inputs] if self.written_inputs else outputs


def _normal(generator: torch.Generator, dtype: torch.dtype, *sizes: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(sizes, generator=generator) * scale).to(dtype)


def _norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * gamma


def norm_cases(sizes: list[tuple[int, int]], is_benchmark: bool) -> Iterator[Case]:
    """RmsNorm, Add, AddRmsNorm, SwiGlu on [rows, size]."""
    for rows, size in sizes:
        label = f"{rows}x{size}"

        def two(generator, dtype, rows=rows, size=size):
            return [_normal(generator, dtype, rows, size), _normal(generator, dtype, rows, size)]

        def with_gamma(generator, dtype, rows=rows, size=size):
            return [_normal(generator, dtype, rows, size), _normal(generator, dtype, size)]

        def three(generator, dtype, two=two, size=size):
            return [*two(generator, dtype), _normal(generator, dtype, size)]

        def gate_up(generator, dtype, rows=rows, size=size):
            return [_normal(generator, dtype, rows, 2 * size, scale=4.0)]

        def swiglu(t: Tensors) -> Tensors:
            gate, up = t[0].chunk(2, dim=-1)
            return [gate * torch.sigmoid(gate) * up]

        def add_norm(t: Tensors) -> Tensors:
            return [t[0] + t[1], _norm(t[0] + t[1], t[2], 1e-6)]

        epsilon = {"epsilon": 1e-6}
        shared = {"is_benchmark": is_benchmark}
        yield Case("RmsNorm", label, with_gamma, lambda t: [_norm(t[0], t[1], 1e-6)], epsilon, **shared)
        yield Case("Add", label, two, lambda t: [t[0] + t[1]], **shared)
        yield Case("AddRmsNorm", label, three, add_norm, epsilon, **shared)
        yield Case("SwiGlu", label, gate_up, swiglu, **shared)


def linear_cases(sizes: list[tuple[int, int, int]], is_benchmark: bool) -> Iterator[Case]:
    """Linear with m rows, n columns, k summands, in both layouts, with and without bias, one and three parts."""
    variants = [(1, 0, 1)] if is_benchmark else [(1, 0, 1), (1, 1, 1), (0, 0, 1), (0, 1, 1), (1, 1, 3), (0, 0, 2)]
    for m, n, k in sizes:
        for transposed, has_bias, parts in variants:

            def make(generator, dtype, m=m, n=n, k=k, transposed=transposed, has_bias=has_bias, parts=parts):
                tensors = [_normal(generator, dtype, m, k)]
                for _ in range(parts):
                    shape = (n, k) if transposed else (k, n)
                    tensors.append(_normal(generator, dtype, *shape, scale=k**-0.5))
                    if has_bias:
                        tensors.append(_normal(generator, dtype, n))
                return tensors

            def exact(t: Tensors, transposed=transposed, has_bias=has_bias, parts=parts) -> Tensors:
                step = 2 if has_bias else 1
                columns = []
                for weight_at in range(1, 1 + parts * step, step):
                    weight = t[weight_at].t() if transposed else t[weight_at]
                    columns.append(t[0] @ weight + (t[weight_at + 1] if has_bias else 0))
                return [torch.cat(columns, dim=1)]

            layout = "nk" if transposed else "kn"
            label = f"m{m} n{n} k{k} {layout} parts{parts}{' bias' if has_bias else ''}"
            parameters = {"transposed": transposed, "has_bias": has_bias, "parts": parts}
            flops = 2 * m * n * k * parts
            yield Case("Linear", label, make, exact, parameters, flops=flops, is_benchmark=is_benchmark)


def gated_linear_cases(sizes: list[tuple[int, int, int]], is_benchmark: bool) -> Iterator[Case]:
    """LinearSwiGlu with m rows, n columns of gate and of up as two parts, k summands."""
    for m, n, k in sizes:

        def make(generator, dtype, m=m, n=n, k=k):
            parts = [_normal(generator, dtype, n, k, scale=2 * k**-0.5) for _ in range(2)]
            return [_normal(generator, dtype, m, k), *parts]

        def exact(t: Tensors) -> Tensors:
            gate = t[0] @ t[1].t()
            return [gate * torch.sigmoid(gate) * (t[0] @ t[2].t())]

        parameters = {"transposed": 1, "has_bias": 0, "parts": 2}
        label = f"m{m} n{n} k{k}"
        yield Case("LinearSwiGlu", label, make, exact, parameters, flops=4 * m * n * k, is_benchmark=is_benchmark)


def gather_cases() -> Iterator[Case]:
    """GatherRows with repeated and unordered indices."""
    for rows, count, size in [(1, 1, 1), (7, 5, 33), (130, 20, 64), (0, 5, 8)]:

        def make(generator, dtype, rows=rows, count=count, size=size):
            indices = torch.randint(0, count, (rows,), generator=generator)
            return [_normal(generator, dtype, count, size), indices]

        yield Case("GatherRows", f"{rows} of {count}x{size}", make, lambda t: [t[0][t[1]]])


def argmax_cases(sizes: list[tuple[int, int]], is_benchmark: bool) -> Iterator[Case]:
    """ArgmaxRows with several equal largest elements a row, of which the first counts."""
    for rows, size in sizes:

        def make(generator, dtype, rows=rows, size=size):
            return [_normal(generator, dtype, rows, size).mul(4).round().div(4)]

        def first_largest(t: Tensors) -> Tensors:
            is_largest = t[0] == t[0].amax(dim=1, keepdim=True)
            return [is_largest.int().cumsum(dim=1).eq(0).sum(dim=1)]

        yield Case("ArgmaxRows", f"{rows}x{size}", make, first_largest, is_benchmark=is_benchmark)


def split_and_rope_cases(sizes: list[tuple[int, int, int, int]]) -> Iterator[Case]:
    """SplitQkv and Rope on n tokens of heads, kv_heads and head_size."""
    for n, heads, kv_heads, d in sizes:
        label = f"n{n} h{heads} kv{kv_heads} d{d}"
        parameters = {"heads": heads, "kv_heads": kv_heads, "head_size": d}

        def qkv(generator, dtype, n=n, heads=heads, kv_heads=kv_heads, d=d):
            return [_normal(generator, dtype, n, (heads + 2 * kv_heads) * d)]

        def split(t: Tensors, heads=heads, kv_heads=kv_heads, d=d) -> Tensors:
            parts = t[0].split([heads * d, kv_heads * d, kv_heads * d], dim=1)
            return [part.unflatten(1, (part.shape[1] // d, d)) for part in parts]

        def rotated(generator, dtype, n=n, heads=heads, kv_heads=kv_heads, d=d):
            angles = torch.rand(n, d // 2, generator=generator) * 2 * math.pi
            angles = torch.cat([angles, angles], dim=1)
            tensors = [_normal(generator, dtype, n, count, d) for count in (heads, kv_heads)]
            return [*tensors, angles.cos().to(dtype), angles.sin().to(dtype)]

        def rope(t: Tensors, d=d) -> Tensors:
            def turn(x: torch.Tensor) -> torch.Tensor:
                swapped = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], dim=-1)
                return x * t[2].unsqueeze(1) + swapped * t[3].unsqueeze(1)

            return [turn(t[0]), turn(t[1])]

        yield Case("SplitQkv", label, qkv, split, parameters)
        yield Case("Rope", label, rotated, rope)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """q [rows, heads, d] against k, v [keys, kv_heads, d]; the last row sees every key, each before it one less."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    rows, keys = scores.shape[1:]
    future = torch.ones(rows, keys, dtype=torch.bool).triu(keys - rows + 1)
    weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v).reshape(rows, -1)


def self_attention_cases(sizes: list[tuple[list[int], int, int, int]], is_benchmark: bool) -> Iterator[Case]:
    """SelfAttention over packed sequences of the given lengths."""
    for lengths, heads, kv_heads, d in sizes:
        scale = d**-0.5

        def make(generator, dtype, lengths=lengths, heads=heads, kv_heads=kv_heads, d=d):
            counts = (heads, kv_heads, kv_heads)
            tensors = [_normal(generator, dtype, sum(lengths), count, d) for count in counts]
            return [*tensors, torch.tensor(lengths, dtype=torch.int32)]

        def exact(t: Tensors, lengths=lengths, scale=scale) -> Tensors:
            parts = zip(*(tensor.split(lengths) for tensor in t[:3]), strict=True)
            return [torch.cat([_attend(q, k, v, scale) for q, k, v in parts])]

        label = f"{'+'.join(map(str, lengths))} h{heads} kv{kv_heads} d{d}"
        parameters = {"heads": heads, "kv_heads": kv_heads, "head_size": d, "scale": scale}
        flops = sum(2 * length * (length + 1) * heads * d for length in lengths)
        yield Case("SelfAttention", label, make, exact, parameters, flops=flops, is_benchmark=is_benchmark)


@dataclass(frozen=True)
class Paging:
    """A paged cache whose blocks lie in random order and whose unwritten rows are NaN."""

    contexts: list[int]
    block_size: int
    kv_heads: int
    head_size: int

    def tables(self, generator: torch.Generator) -> torch.Tensor:
        width = max(-(-context // self.block_size) for context in self.contexts)
        order = torch.randperm(width * len(self.contexts) + 2, generator=generator)
        return order[: width * len(self.contexts)].view(len(self.contexts), width).to(torch.int32)

    def cache(self, generator: torch.Generator, dtype: torch.dtype, tables: torch.Tensor) -> torch.Tensor:
        shape = (tables.numel() + 2, self.block_size, self.kv_heads, self.head_size)
        cache = torch.full(shape, float("nan"), dtype=dtype)
        for table, context in zip(tables, self.contexts, strict=True):
            rows = self.rows(table, context)
            values = _normal(generator, dtype, context, self.kv_heads, self.head_size)
            cache.view(-1, self.kv_heads, self.head_size)[rows] = values
        return cache

    def rows(self, table: torch.Tensor, context: int) -> torch.Tensor:
        """Cache rows of the tokens of one sequence."""
        places = torch.arange(context)
        return table[places // self.block_size].long() * self.block_size + places % self.block_size


def paged_attention_cases(sizes: list[tuple[list[int], int, int, int, int]], is_benchmark: bool) -> Iterator[Case]:
    """PagedAttention of one query a sequence over contexts in blocks."""
    for contexts, block_size, heads, kv_heads, d in sizes:
        paging = Paging(contexts, block_size, kv_heads, d)
        scale = d**-0.5

        def make(generator, dtype, paging=paging, heads=heads):
            tables = paging.tables(generator)
            caches = [paging.cache(generator, dtype, tables) for _ in range(2)]
            q = _normal(generator, dtype, len(paging.contexts), heads, paging.head_size)
            return [q, *caches, tables, torch.tensor(paging.contexts, dtype=torch.int32)]

        def exact(t: Tensors, paging=paging, scale=scale) -> Tensors:
            rows = []
            keys, values = (cache.view(-1, paging.kv_heads, paging.head_size) for cache in t[1:3])
            for index, context in enumerate(paging.contexts):
                picked = paging.rows(t[3][index], context)
                rows.append(_attend(t[0][index : index + 1], keys[picked], values[picked], scale))
            return [torch.cat(rows)]

        label = f"ctx {'+'.join(map(str, contexts))} bs{block_size} h{heads} kv{kv_heads} d{d}"
        parameters = {"heads": heads, "kv_heads": kv_heads, "head_size": d, "scale": scale}
        flops = sum(4 * context * heads * d for context in contexts)
        yield Case("PagedAttention", label, make, exact, parameters, flops=flops, is_benchmark=is_benchmark)


def cache_cases() -> Iterator[Case]:
    """ReshapeAndCache: some slots are -1, and rows that no slot names keep what they held."""
    for n, kv_heads, d, block_size in [(1, 1, 64, 16), (9, 2, 80, 4), (70, 3, 16, 128)]:

        def make(generator, dtype, n=n, kv_heads=kv_heads, d=d, block_size=block_size):
            blocks = -(-n // block_size) + 2
            slots = torch.randperm(blocks * block_size, generator=generator)[:n].to(torch.int32)
            slots[1::4] = -1
            rows = [_normal(generator, dtype, n, kv_heads, d) for _ in range(2)]
            caches = [_normal(generator, dtype, blocks, block_size, kv_heads, d) for _ in range(2)]
            return [*rows, *caches, slots]

        def exact(t: Tensors) -> Tensors:
            kept = t[4] >= 0
            for rows, cache in ((t[0], t[2]), (t[1], t[3])):
                cache.view(-1, *rows.shape[1:])[t[4][kept].long()] = rows[kept]
            return [t[2], t[3]]

        label = f"n{n} kv{kv_heads} d{d} bs{block_size}"
        yield Case("ReshapeAndCache", label, make, exact, written_inputs=(2, 3))


def fused_linear_cases(sizes: list[tuple[int, int, int]]) -> Iterator[Case]:
    """FusedLinear with m rows, n columns a part, k summands: with norm, SwiGLU, residual, bias, several parts."""
    variants = [  # transposed, has_bias, parts, has_norm, swiglu, has_residual
        (1, 1, 3, 1, 0, 0),
        (1, 0, 1, 0, 0, 1),
        (1, 0, 2, 1, 1, 0),
        (1, 1, 2, 1, 1, 1),
        (0, 1, 1, 1, 0, 1),
    ]
    names = ("transposed", "has_bias", "parts", "has_norm", "swiglu", "has_residual")
    for m, n, k in sizes:
        for variant in variants:
            parameters = dict(zip(names, variant, strict=True))

            def make(generator, dtype, m=m, n=n, k=k, p=parameters):
                tensors = [_normal(generator, dtype, m, k)]
                if p["has_norm"]:
                    tensors.append(_normal(generator, dtype, k))
                for _ in range(p["parts"]):
                    shape = (n, k) if p["transposed"] else (k, n)
                    tensors.append(_normal(generator, dtype, *shape, scale=k**-0.5))
                    if p["has_bias"]:
                        tensors.append(_normal(generator, dtype, n))
                if p["has_residual"]:
                    tensors.append(_normal(generator, dtype, m, n * p["parts"] // (2 if p["swiglu"] else 1)))
                return tensors

            def exact(t: Tensors, p=parameters) -> Tensors:
                rest = list(t[1:])
                x = _norm(t[0], rest.pop(0), 1e-6) if p["has_norm"] else t[0]
                columns = []
                for _ in range(p["parts"]):
                    weight = rest.pop(0)
                    product = x @ (weight.t() if p["transposed"] else weight)
                    columns.append(product + rest.pop(0) if p["has_bias"] else product)
                y = torch.cat(columns, dim=1)
                if p["swiglu"]:
                    gate, up = y.chunk(2, dim=-1)
                    y = gate * torch.sigmoid(gate) * up
                return [y + rest.pop(0) if p["has_residual"] else y]

            label = f"m{m} n{n} k{k} " + " ".join(f"{name}{parameters[name]}" for name in names)
            yield Case("FusedLinear", label, make, exact, {**parameters, "epsilon": 1e-6})


def rope_attention_cases(sizes: list[tuple[list[int], int, int, int, int]], is_paged: bool) -> Iterator[Case]:
    """RopeAttention of one token a sequence, or of whole prompts; the cache is written, as the outputs show."""
    for lengths, block_size, heads, kv_heads, d in sizes:
        paging = Paging(lengths, block_size, kv_heads, d)
        scale = d**-0.5

        def make(generator, dtype, paging=paging, heads=heads, is_paged=is_paged):
            d, lengths = paging.head_size, torch.tensor(paging.contexts, dtype=torch.int32)
            tables = paging.tables(generator)
            tokens = len(paging.contexts) if is_paged else sum(paging.contexts)
            angles = torch.rand(tokens, d // 2, generator=generator) * 2 * math.pi
            angles = torch.cat([angles, angles], dim=1)
            rows = [paging.rows(table, n) for table, n in zip(tables, paging.contexts, strict=True)]
            slots = torch.cat([row[-1:] if is_paged else row for row in rows]).to(torch.int32)
            if not is_paged:  # in decode a token whose key is nowhere has no defined context
                slots[2::5] = -1
            caches = [paging.cache(generator, dtype, tables) for _ in range(2)]
            qkv = _normal(generator, dtype, tokens, (heads + 2 * paging.kv_heads) * d)
            inputs = [qkv, angles.cos().to(dtype), angles.sin().to(dtype), *caches, slots, lengths]
            return [*inputs, tables] if is_paged else inputs

        def exact(t: Tensors, paging=paging, heads=heads, scale=scale, is_paged=is_paged) -> Tensors:
            d, kv_heads, tokens = paging.head_size, paging.kv_heads, t[0].shape[0]
            q, k, v = t[0].view(tokens, -1, d).split([heads, kv_heads, kv_heads], dim=1)

            def turn(x: torch.Tensor) -> torch.Tensor:
                swapped = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], dim=-1)
                return x * t[1].unsqueeze(1) + swapped * t[2].unsqueeze(1)

            q, k = turn(q), turn(k)
            if not is_paged:
                parts = zip(*(tensor.split(paging.contexts) for tensor in (q, k, v)), strict=True)
                return [torch.cat([_attend(*part, scale) for part in parts])]
            keys, values = (cache.clone().view(-1, kv_heads, d) for cache in t[3:5])
            kept = t[5] >= 0
            keys[t[5][kept].long()], values[t[5][kept].long()] = k[kept], v[kept]
            rows = []
            for index, context in enumerate(paging.contexts):
                picked = paging.rows(t[7][index], context)
                rows.append(_attend(q[index : index + 1], keys[picked], values[picked], scale))
            return [torch.cat(rows)]

        kind = "paged" if is_paged else "whole"
        label = f"{kind} {'+'.join(map(str, lengths))} bs{block_size} h{heads} kv{kv_heads} d{d}"
        parameters = {"heads": heads, "kv_heads": kv_heads, "head_size": d, "scale": scale, "is_paged": is_paged}
        yield Case("RopeAttention", label, make, exact, parameters)


AWKWARD_CASES: list[Case] = [
    *norm_cases([(0, 8), (1, 1), (1, 15), (3, 16), (2, 77), (65, 896)], False),
    *linear_cases([(0, 4, 4), (1, 1, 1), (1, 65, 17), (3, 7, 130), (8, 96, 64), (9, 33, 48), (64, 130, 77)], False),
    *linear_cases([(9, 34, 48), (65, 130, 78)], False),
    *argmax_cases([(0, 3), (1, 1), (3, 7), (2, 16), (5, 515), (2, 9001), (1, 40000), (9, 4104), (290, 72)], False),
    *gather_cases(),
    *split_and_rope_cases([(0, 2, 1, 64), (1, 1, 1, 2), (5, 14, 2, 64), (3, 3, 3, 80), (17, 4, 1, 128), (2, 2, 2, 96)]),
    *self_attention_cases(
        [
            ([1], 1, 1, 64),
            ([1, 63, 64, 65], 2, 1, 64),
            ([130], 7, 1, 80),
            ([5, 1, 33], 4, 2, 128),
            ([9], 80, 1, 16),
        ],
        False,
    ),
    *paged_attention_cases(
        [
            ([1], 16, 1, 1, 64),
            ([15, 16, 17], 16, 4, 2, 64),
            ([128, 129], 128, 7, 1, 80),
            ([300, 1, 2], 1, 3, 3, 128),
            ([70], 64, 70, 1, 96),
            ([2049], 128, 7, 1, 64),
            ([700], 16, 5, 1, 80),
            ([131072, 3], 256, 2, 1, 64),
        ],
        False,
    ),
    *cache_cases(),
]
"""Small and odd sizes: 0 and 1 rows, sizes that no vector divides, block boundaries, one kv head."""

_ROPE_ATTENTION_SIZES: list[tuple[list[int], int, int, int, int]] = [
    ([1], 16, 1, 1, 64),
    ([15, 16, 17], 16, 4, 2, 64),
    ([128, 129], 128, 7, 1, 80),
    ([300, 1, 2, 7], 16, 6, 3, 128),
    ([70, 33], 64, 14, 2, 96),
    ([257] * 8, 256, 28, 4, 128),
    ([33, 40], 32, 2, 1, 256),
    ([5, 9], 4, 3, 1, 34),
]

CUDA_FUSED_CASES: list[Case] = [
    *fused_linear_cases([(0, 8, 16), (1, 64, 128), (2, 896, 896), (3, 34, 77), (8, 256, 512), (33, 96, 64)]),
    *fused_linear_cases([(16, 64, 192), (64, 128, 256), (128, 192, 320), (200, 64, 128), (512, 256, 128)]),
    *rope_attention_cases([*_ROPE_ATTENTION_SIZES, ([131072, 3], 256, 7, 1, 64)], True),
    *rope_attention_cases(_ROPE_ATTENTION_SIZES, False),
]
"""The operations that only CUDA has kernels for."""

CPU_FUSED_CASES: list[Case] = [
    *gated_linear_cases([(0, 16, 16), (1, 48, 64), (3, 33, 77), (8, 64, 130), (9, 17, 34), (200, 112, 96)], False)
]
"""The operations that only the CPU has kernels for."""

BENCHMARK_CASES: list[Case] = [
    *norm_cases([(1, 896), (512, 896), (512, 4864)], True),
    *linear_cases([(m, n, k) for m in (1, 8, 128, 512) for n, k in ((1152, 896), (9728, 896), (896, 4864))], True),
    *linear_cases([(1, 151936, 896)], True),
    *argmax_cases([(1, 151936), (8, 151936), (32, 151936), (128, 151936), (256, 151936)], True),
    *self_attention_cases([([512], 14, 2, 64), ([2048], 14, 2, 64), ([512], 12, 2, 128)], True),
    *paged_attention_cases([([128], 128, 14, 2, 64), ([2048], 128, 14, 2, 64), ([2048] * 8, 128, 14, 2, 64)], True),
]
"""The sizes of Qwen2.5-0.5B."""
