"""Measures prefill, decode and serving of one model; the body of `modeltorch bench`."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from modeltorch.engine import DecodeBatch, Engine, Request
from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM
from modeltorch.limits import Limit, decode_bytes, linear_rate, prefill_flops, read_rate
from modeltorch.subject import Subject, synchronise

DECODE_STEPS = 128
"""Timed steps of a decode measurement; the context grows by one each, around its mean."""

_WARM_UP_STEPS = 8
_STEPS_PER_SAMPLE = 8  # timed steps between two samples of the machine's read rate
_WAKING_SECONDS = 0.2
_STEPS_PER_WAIT = 32  # on a GPU, steps that are timed together: the host waits for the last of them alone

PROMPT_LENGTHS, PREFILL_BATCHES = (128, 512), (1, 8)
CONTEXTS, DECODE_BATCHES = (128, 2048), (1, 8)
REQUESTS, REQUEST_PROMPT, REQUEST_NEW_TOKENS = 256, (64, 512), 128
"""What is measured where nothing else is asked for."""


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
        return self.subject.as_json() | {
            "workload": self.workload,
            "value": self.value,
            "unit": self.unit,
            "min": self.least,
            "max": self.most,
            "runs": self.runs,
            **self._limit_as_json(),
        }

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


def _seconds(device: torch.device, body: Callable[[], object]) -> float:
    synchronise(device)
    start = time.perf_counter()
    body()
    synchronise(device)
    return time.perf_counter() - start


def _wake(device: torch.device) -> None:
    """Has a GPU work for a moment: an idle one raises its clocks, and some steps would be over before it has."""
    if device.type != "cuda":
        return
    matrix = torch.zeros(4096, 4096, dtype=torch.bfloat16, device=device)
    end = time.perf_counter() + _WAKING_SECONDS
    while time.perf_counter() < end:
        torch.mm(matrix, matrix)
        synchronise(device)


def _prompts(subject: Subject, lengths: Sequence[int]) -> list[list[int]]:
    generator = random.Random(0)
    return [[generator.randrange(subject.model.vocab_size) for _ in range(length)] for length in lengths]


def _admitted(engine: Engine, prompts: list[list[int]], new_tokens: int) -> list[Request]:
    requests = [Request(prompt, new_tokens, ignore_eos=True) for prompt in prompts]
    for request in requests:
        engine.check(request)
        request.blocks = engine.cache.allocate(engine.cache.blocks_needed(request.limit))
    return requests


Step = Callable[[], object]
"""Runs one step with its sampling, again and again."""


@contextmanager
def prefill_step(subject: Subject, batch: int, length: int) -> Iterator[Step]:
    """Whole prefills of `batch` prompts of `length` tokens, logits of the last rows only."""
    engine = Engine(subject.model)
    requests = _admitted(engine, _prompts(subject, [length] * batch), 1)
    yield lambda: engine.prefill_step(requests)
    for request in requests:
        engine.cache.release(request.blocks)


def prefill(subject: Subject, batch: int, length: int, runs: int) -> Iterator[Result]:
    """See prefill_step; sampling is included."""
    device = subject.model.device
    rate = linear_rate(subject.model, batch * length)
    seconds = []
    _wake(device)
    with prefill_step(subject, batch, length) as step:
        for _ in range(runs + 1):
            seconds.append(_seconds(device, step))
            if rate is not None:
                rate.sample()
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


def _last_context(context: int) -> int:
    """Most tokens of a sequence in such a decode."""
    return _first_context(context) + DECODE_STEPS + _WARM_UP_STEPS + 1


@contextmanager
def decode_steps(subject: Subject, batch: int, first: int, count: int) -> Iterator[Step]:
    """`count` decode steps in a row; before them every sequence has `first` tokens.

    The cache is not filled by a prefill: rows that no step wrote are zeroed, which costs the same to read.
    """
    engine = Engine(subject.model)
    requests = _admitted(engine, _prompts(subject, [first] * batch), count + 1)
    for request in requests:
        for key, value in engine.cache.pairs:
            key[request.blocks] = 0
            value[request.blocks] = 0
        request.new_tokens.append(0)
    steps = DecodeBatch(requests, engine.cache.block_size, subject.model.device)
    yield lambda: engine.decode_step(steps)
    for request in requests:
        engine.cache.release(request.blocks)


def decode(subject: Subject, batch: int, context: int) -> Iterator[Result]:
    """Decode steps in a row, sampling included, at a mean context of `context` tokens."""
    device = subject.model.device
    rate = read_rate(device)
    with decode_steps(subject, batch, _first_context(context), DECODE_STEPS + _WARM_UP_STEPS) as step:
        if device.type == "cuda":
            _wake(device)
            timed = _without_waiting(device, step)
            if rate is not None:
                rate.sample()
        else:
            seconds = []
            for number in range(_WARM_UP_STEPS + DECODE_STEPS):
                seconds.append(_seconds(device, step))
                if rate is not None and number % _STEPS_PER_SAMPLE == 0:
                    rate.sample()
            timed = seconds[_WARM_UP_STEPS:]
    limit = None
    if rate is not None:
        limit = rate.limit(decode_bytes(subject.model, batch, context), statistics.median(timed))
    yield from _both_units(subject, f"decode_b{batch}_ctx{context}", timed, batch, limit)


def _without_waiting(device: torch.device, step: Step) -> list[float]:
    """Seconds a step, of groups of steps in which the host runs ahead of the GPU as it does in serving."""
    for _ in range(_WARM_UP_STEPS):
        step()

    def group() -> None:
        for _ in range(_STEPS_PER_WAIT):
            step()

    return [_seconds(device, group) / _STEPS_PER_WAIT for _ in range(DECODE_STEPS // _STEPS_PER_WAIT)]


def serve(subject: Subject, requests: int, prompt_range: tuple[int, int], new_tokens: int) -> Iterator[Result]:
    """`requests` requests at once, prompts of uniform length, greedy, each to its full length; whole seconds."""
    generator = random.Random(0)
    prompts = _prompts(subject, [generator.randint(*prompt_range) for _ in range(requests)])
    # Steps of these sizes have then been set up: kernels chosen, graphs captured (FlashQwen2ForCausalLM.warm_up).
    subject.model.generate(prompts, max_new_tokens=2, ignore_eos=True)
    seconds = _seconds(
        subject.model.device,
        lambda: subject.model.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True),
    )
    yield Result(subject, f"serve_r{requests}", "s", seconds, seconds, seconds, 1)


@dataclass(frozen=True)
class Workload:
    """A measurement to be made.

    Attributes:
        name: as the results have it.
        batch: sequences at a time, at least.
        tokens: most tokens of a sequence, prompt and answer.
        run: makes it.
        step: sets up so many of its steps; None where it is not one step again and again.
        length: tokens of each sequence at such a step.
    """

    name: str
    batch: int
    tokens: int
    run: Callable[[], Iterator[Result]]
    step: Callable[[int], AbstractContextManager[Step]] | None = None
    length: int = 0

    def fits(self, model: FlashQwen2ForCausalLM, asked_length: bool, asked_size: bool) -> bool:
        """Whether a model has room for it.

        Raises:
            ValueError: it has not, and what is too large for it was asked for.
        """
        if self.tokens > model.max_positions:
            if asked_length:
                raise ValueError(
                    f"{self.name}: sequences of {self.tokens} tokens exceed the model's {model.max_positions} positions"
                )
            return False
        cache = model.cache
        needed = self.batch * cache.blocks_needed(self.tokens)
        if needed > cache.num_blocks and asked_size:
            raise ValueError(
                f"{self.name}: {self.batch} sequences of {self.tokens} tokens need {needed} cache blocks of "
                f"{cache.block_size}, but the cache has {cache.num_blocks}"
            )
        return needed <= cache.num_blocks


def _prefill_workload(subject: Subject, batch: int, length: int, runs: int) -> Workload:
    return Workload(
        f"prefill_b{batch}_s{length}",
        batch,
        length + 1,
        partial(prefill, subject, batch, length, runs),
        lambda _: prefill_step(subject, batch, length),
        length,
    )


def _decode_workload(subject: Subject, batch: int, context: int) -> Workload:
    return Workload(
        f"decode_b{batch}_ctx{context}",
        batch,
        _last_context(context),
        partial(decode, subject, batch, context),
        lambda count: decode_steps(subject, batch, context - count // 2, count),
        context,
    )


def plan(
    subject: Subject,
    *,
    prompt_lengths: Sequence[int] | None = None,
    prefill_batches: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    decode_batches: Sequence[int] | None = None,
    requests: int | None = None,
    runs: int = 5,
    request_prompt: tuple[int, int] | None = None,
    request_new_tokens: int | None = None,
) -> tuple[list[Workload], list[Workload]]:
    """What to measure, and what is left out of it because the model has no room.

    Args:
        subject: the model.
        prompt_lengths: tokens of each prompt of a prefill. None, here and below: the usual sizes.
        prefill_batches: prompts of a prefill, with each of the lengths.
        contexts: mean contexts of decode steps.
        decode_batches: sequences of a decode step, with each of the contexts.
        requests: how many to serve end to end; 0 for none.
        runs: timed prefills.
        request_prompt: the least and the most tokens of a request's prompt.
        request_new_tokens: tokens of each answer.

    Returns:
        The workloads that fit, in order, and those of the usual sizes (where an argument is None) that do not.

    Raises:
        ValueError: a size that was asked for does not fit, or nothing is left.
    """
    prefills = [
        _prefill_workload(subject, batch, length, runs)
        for batch in _or(prefill_batches, PREFILL_BATCHES)
        for length in _or(prompt_lengths, PROMPT_LENGTHS)
    ]
    decodes = [
        _decode_workload(subject, batch, context)
        for batch in _or(decode_batches, DECODE_BATCHES)
        for context in _or(contexts, CONTEXTS)
    ]
    count = REQUESTS if requests is None else requests
    prompt, answer = request_prompt or REQUEST_PROMPT, request_new_tokens or REQUEST_NEW_TOKENS
    serving = [Workload(f"serve_r{count}", 1, prompt[1] + answer, partial(serve, subject, count, prompt, answer))]
    asked_requests = any(option is not None for option in (requests, request_prompt, request_new_tokens))
    kept: list[Workload] = []
    left_out: list[Workload] = []
    for workloads, asked_length, asked_batch in (
        (prefills, prompt_lengths is not None, prefill_batches is not None),
        (decodes, contexts is not None, decode_batches is not None),
        (serving if count else [], asked_requests, asked_requests),
    ):
        for workload in workloads:
            fits = workload.fits(subject.model, asked_length, asked_length or asked_batch)
            (kept if fits else left_out).append(workload)
    if not kept:
        raise ValueError("nothing to measure: " + ("no size fits the model" if left_out else "every list is empty"))
    return kept, left_out


def _or(asked: Sequence[int] | None, usual: Sequence[int]) -> Sequence[int]:
    return usual if asked is None else asked
