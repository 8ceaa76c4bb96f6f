"""Measures prefill, decode and serving of one model; the body of `modeltorch bench`."""

from __future__ import annotations

import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from modeltorch import shapes
from modeltorch.engine import DecodeBatch, Engine, Request
from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM
from modeltorch.limits import Limit, decode_bytes, linear_rate, prefill_flops, read_rate

DECODE_STEPS = 128
"""Timed steps of a decode measurement; the context grows by one each, around its mean."""

_WARM_UP_STEPS = 8
_STEPS_PER_SAMPLE = 8  # timed steps between two samples of the machine's read rate
_STEPS_PER_WAIT = 32  # on a GPU, steps that are timed together: the host waits for the last of them alone


@cache
def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return run.stdout.strip().splitlines()[0] if run.stdout.strip() else "unknown"


def hardware(device: torch.device) -> str:
    """What the figures were taken on, for example "AMD EPYC, 2 threads, avx512"."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, driver {_driver()}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{name}, {torch.get_num_threads()} threads, {torch.ops.ModelTorch.cpu_level()}"


def _commit() -> str:
    folder = Path(__file__).parent
    run = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or "unknown"


@dataclass(frozen=True)
class Subject:
    """The model under measurement."""

    name: str
    model: FlashQwen2ForCausalLM

    @classmethod
    def from_shape(cls, shape: str, device: str, dtype: str, **options: Any) -> Subject:
        """A model of a known shape with random weights.

        Raises:
            ValueError: the shape is not known.
        """
        if shape not in shapes.SHAPES:
            raise ValueError(f"--shape must be one of {', '.join(shapes.SHAPES)}, got {shape}")
        config = shapes.SHAPES[shape]
        weights = config.random_weights(getattr(torch, dtype), device)
        model = FlashQwen2ForCausalLM(config, weights, device=device, dtype=dtype, **options)
        model.init_ascend_weight()
        return cls(shape, model)

    @classmethod
    def from_checkpoint(cls, path: str, device: str, dtype: str) -> Subject:
        """A model from a checkpoint."""
        return cls(Path(path).name, FlashQwen2ForCausalLM.from_pretrained(path, device=device, dtype=dtype))


@dataclass(frozen=True)
class Result:
    """One measurement: the median of `runs` samples, with their range."""

    subject: Subject
    workload: str
    unit: str
    value: float
    least: float
    most: float
    runs: int
    limit: Limit | None = None

    def row(self) -> str:
        """The measurement as a line of a table."""
        spread = f"({self.least:.5g} to {self.most:.5g}, {self.runs} runs)"
        bound = ""
        if self.limit is not None:
            bound = f"  {self.limit.fraction:.1%} of {self.limit.rate:.4g} {self.limit.unit}"
        return f"{self.subject.name:14} {self.workload:24} {self.value:10.5g} {self.unit:6} {spread}{bound}"

    def as_json(self) -> dict[str, Any]:
        """The measurement under the keys that benchmarks/ reads."""
        model = self.subject.model
        return {
            "model": self.subject.name,
            "device": model.device.type,
            "hardware": hardware(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "workload": self.workload,
            "value": self.value,
            "unit": self.unit,
            "min": self.least,
            "max": self.most,
            "runs": self.runs,
            "commit": _commit(),
            "torch": torch.__version__,
        } | self._limit_as_json()

    def _limit_as_json(self) -> dict[str, Any]:
        if self.limit is None:
            return {}
        limit, unit, fraction = self.limit.rate, self.limit.unit, self.limit.fraction
        return {"limit": limit, "limit_unit": unit, "fraction_of_limit": fraction}


def _both_units(
    subject: Subject, workload: str, seconds: Sequence[float], tokens: int, limit: Limit | None
) -> Iterator[Result]:
    median, least, most = statistics.median(seconds), min(seconds), max(seconds)
    runs = len(seconds)
    yield Result(subject, workload, "ms", median * 1e3, least * 1e3, most * 1e3, runs, limit)
    yield Result(subject, workload, "tok/s", tokens / median, tokens / most, tokens / least, runs, limit)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(device: torch.device, body: Callable[[], object]) -> float:
    _synchronise(device)
    start = time.perf_counter()
    body()
    _synchronise(device)
    return time.perf_counter() - start


def _prompts(subject: Subject, lengths: Sequence[int]) -> list[list[int]]:
    generator = random.Random(0)
    return [[generator.randrange(subject.model.vocab_size) for _ in range(length)] for length in lengths]


def _admitted(engine: Engine, prompts: list[list[int]], new_tokens: int) -> list[Request]:
    requests = [Request(prompt, new_tokens, ignore_eos=True) for prompt in prompts]
    for request in requests:
        engine.check(request)
        request.blocks = engine.cache.allocate(engine.cache.blocks_needed(request.limit))
    return requests


def prefill(subject: Subject, batch: int, length: int, runs: int) -> Iterator[Result]:
    """Whole prefills of `batch` prompts of `length` tokens, logits of the last rows only, sampling included."""
    engine = Engine(subject.model)
    requests = _admitted(engine, _prompts(subject, [length] * batch), 1)
    device = subject.model.device
    rate = linear_rate(subject.model, batch * length)
    seconds = []
    for _ in range(runs + 1):
        seconds.append(_seconds(device, lambda: engine.prefill_step(requests)))
        if rate is not None:
            rate.sample()
    for request in requests:
        engine.cache.release(request.blocks)
    limit = None
    if rate is not None:
        limit = rate.limit(prefill_flops(subject.model, [length] * batch), statistics.median(seconds[1:]))
    yield from _both_units(subject, f"prefill_b{batch}_s{length}", seconds[1:], batch * length, limit)


def _first_context(context: int) -> int:
    """Tokens before the first step of a decode whose timed steps have a mean context of `context`.

    Raises:
        ValueError: there is no room for the steps before the mean.
    """
    steps = DECODE_STEPS // 2 + _WARM_UP_STEPS
    if context <= steps:
        raise ValueError(f"--context must be at least {steps + 1}, got {context}")
    return context - steps


def _check(subject: Subject, batch: int, length: int, new_tokens: int) -> None:
    """Refuses a batch that does not fit the positions or the cache.

    Raises:
        ValueError: it does not fit.
    """
    engine = Engine(subject.model)
    request = Request([0] * length, new_tokens)
    engine.check(request)
    needed = batch * engine.cache.blocks_needed(request.limit)
    if needed > engine.cache.num_blocks:
        raise ValueError(
            f"{batch} sequences of {request.limit} tokens need {needed} cache blocks of "
            f"{engine.cache.block_size}, but the cache has {engine.cache.num_blocks}"
        )


def decode(subject: Subject, batch: int, context: int) -> Iterator[Result]:
    """Decode steps in a row, sampling included, at a mean context of `context` tokens.

    The cache is not filled by a prefill: rows that no step wrote are zeroed, which costs the same to read.
    """
    engine = Engine(subject.model)
    first = _first_context(context)
    requests = _admitted(engine, _prompts(subject, [first] * batch), DECODE_STEPS + _WARM_UP_STEPS + 1)
    for request in requests:
        for key, value in engine.cache.pairs:
            key[request.blocks] = 0
            value[request.blocks] = 0
        request.new_tokens.append(0)
    steps = DecodeBatch(requests, engine.cache.block_size, subject.model.device)
    device = subject.model.device
    rate = read_rate(device)
    if device.type == "cuda":
        timed = _decode_without_waiting(engine, steps)
        if rate is not None:
            rate.sample()
    else:
        seconds = []
        for step in range(_WARM_UP_STEPS + DECODE_STEPS):
            seconds.append(_seconds(device, lambda: engine.decode_step(steps)))
            if rate is not None and step % _STEPS_PER_SAMPLE == 0:
                rate.sample()
        timed = seconds[_WARM_UP_STEPS:]
    for request in requests:
        engine.cache.release(request.blocks)
    limit = None
    if rate is not None:
        limit = rate.limit(decode_bytes(subject.model, batch, context), statistics.median(timed))
    yield from _both_units(subject, f"decode_b{batch}_ctx{context}", timed, batch, limit)


def _decode_without_waiting(engine: Engine, steps: DecodeBatch) -> list[float]:
    """Seconds a step, of groups of steps in which the host runs ahead of the GPU as it does in serving."""
    device = engine.model.device
    for _ in range(_WARM_UP_STEPS):
        engine.decode_step(steps)

    def group() -> None:
        for _ in range(_STEPS_PER_WAIT):
            engine.decode_step(steps)

    return [_seconds(device, group) / _STEPS_PER_WAIT for _ in range(DECODE_STEPS // _STEPS_PER_WAIT)]


def serve(subject: Subject, requests: int, prompt_range: tuple[int, int], new_tokens: int) -> Iterator[Result]:
    """`requests` requests at once, prompts of uniform length, greedy, each to its full length; whole seconds."""
    generator = random.Random(1)
    prompts = _prompts(subject, [generator.randint(*prompt_range) for _ in range(requests)])
    subject.model.generate(prompts[:1], max_new_tokens=2, ignore_eos=True)
    seconds = _seconds(
        subject.model.device,
        lambda: subject.model.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True),
    )
    yield Result(subject, f"serve_r{requests}", "s", seconds, seconds, seconds, 1)


def measure(
    subject: Subject,
    *,
    prompt_lengths: Sequence[int],
    prefill_batches: Sequence[int],
    contexts: Sequence[int],
    decode_batches: Sequence[int],
    requests: int,
    runs: int,
    request_prompt: tuple[int, int] = (64, 512),
    request_new_tokens: int = 128,
) -> Iterator[Result]:
    """Every workload that the options ask for, one after the other; none if one of them cannot run."""
    for batch in prefill_batches:
        for length in prompt_lengths:
            _check(subject, batch, length, 1)
    for batch in decode_batches:
        for context in contexts:
            _check(subject, batch, _first_context(context), DECODE_STEPS + _WARM_UP_STEPS + 1)
    if requests:
        _check(subject, 1, request_prompt[1], request_new_tokens)
    for batch in prefill_batches:
        for length in prompt_lengths:
            yield from prefill(subject, batch, length, runs)
    for batch in decode_batches:
        for context in contexts:
            yield from decode(subject, batch, context)
    if requests:
        yield from serve(subject, requests, request_prompt, request_new_tokens)
