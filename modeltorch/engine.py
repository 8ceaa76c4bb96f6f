"""Continuous batching over the paged cache."""

from __future__ import annotations

import operator
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from modeltorch.sampling import Sampler, Sampling, choosing_device, sampling_rows
from modeltorch.transfer import Download, upload

if TYPE_CHECKING:
    from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM

DEFAULT_NEW_TOKENS = 256
MAX_PREFILL_TOKENS = 4096
MAX_PREFILL_TOKENS_CUDA = 16384
MAX_BATCH = 256


@dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        token_ids: the new tokens only; an end-of-sequence token that ended the answer is the last of them.
        text: the new tokens decoded, special tokens left out; None without a tokenizer.
        finish_reason: "stop" (an end-of-sequence token) or "length" (max_new_tokens).
    """

    token_ids: list[int]
    text: str | None
    finish_reason: str


@dataclass
class Request:
    """A prompt on its way through the engine.

    Attributes:
        prompt_ids: the prompt, int64 on the host; made when the request is checked.
    """

    prompt: list[int]
    max_new_tokens: int | None = None
    ignore_eos: bool = False
    sampling: Sampling = field(default_factory=Sampling)
    new_tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    finish_reason: str = ""
    prompt_ids: torch.Tensor = field(
        default_factory=lambda: torch.empty(0, dtype=torch.int64), compare=False, repr=False
    )

    @property
    def limit(self) -> int:
        """Most tokens that the sequence may grow to."""
        return len(self.prompt) + (self.max_new_tokens or 0)


_PLANNED_STEPS = 64


def _block_tables(requests: list[Request]) -> torch.Tensor:
    """int32 [len(requests), width] on the host, filled up with block 0."""
    width = max(len(request.blocks) for request in requests)
    rows = [request.blocks + [0] * (width - len(request.blocks)) for request in requests]
    return torch.tensor(rows, dtype=torch.int32)


class DecodeBatch:
    """The tensors of a decode step where its tokens are chosen, kept between steps.

    What a step needs beside the tokens (positions, slots, lengths) is known ahead: it is computed on the host for many
    steps at once and copied to the device in one go, so that a step itself launches nothing and waits for nothing.

    Attributes:
        requests: the sequences, in the order of the rows.
        ids: int64 [B], the tokens that the next step reads.
        host_lengths: contexts including those tokens.
        tables: int32 [B, width].
    """

    def __init__(self, requests: list[Request], block_size: int, device: torch.device) -> None:
        device = choosing_device(device)
        self.requests = requests
        self.block_size = block_size
        self.host_lengths = [len(request.prompt) + len(request.new_tokens) for request in requests]
        self._host_tables = _block_tables(requests)
        ids = torch.tensor([request.new_tokens[-1] for request in requests])
        self.ids, self.tables = upload((ids, self._host_tables), device)
        self.sampling = sampling_rows(
            [request.sampling for request in requests], device, [len(request.new_tokens) for request in requests]
        )
        self.device = device
        self._step = _PLANNED_STEPS
        self._positions = self._slots = self._lengths = self.ids

    def _plan(self) -> None:
        """Positions (int64), slots and lengths (int32) of the next steps, each [steps, B]."""
        device = self.ids.device
        lengths = torch.tensor(self.host_lengths, dtype=torch.int64) + torch.arange(_PLANNED_STEPS).unsqueeze(1)
        positions = lengths - 1
        # Steps that no sequence comes to any more have no block of their own.
        columns = (positions // self.block_size).clamp(max=self.tables.shape[1] - 1)
        blocks = self._host_tables.to(torch.int64).gather(1, columns.t()).t()
        slots = blocks * self.block_size + positions % self.block_size
        planned = (positions, slots.to(torch.int32).contiguous(), lengths.to(torch.int32))
        self._positions, self._slots, self._lengths = upload(planned, device)
        self._step = 0

    def step_tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Positions (int64), slots and lengths (int32) of the next step, each [B]."""
        if self._step == _PLANNED_STEPS:
            self._plan()
        return self._positions[self._step], self._slots[self._step], self._lengths[self._step]

    def advance(self, tokens: torch.Tensor) -> None:
        """Takes the sampled tokens as the inputs of the next step."""
        self.ids = tokens
        self.host_lengths = [length + 1 for length in self.host_lengths]
        self._step += 1


class _Read:
    """Tokens that have been read already, in the form of a Download."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def wait(self) -> list[int]:
        """Returns them."""
        return self._tokens


class Engine:
    """Runs requests to their end over one model and its cache.

    Blocks for a whole request (prompt and answer) are reserved when it is admitted, so that a running request never
    waits for memory.
    """

    def __init__(self, model: FlashQwen2ForCausalLM) -> None:
        self.model = model
        self.cache = model.cache
        self._sampler = Sampler()

    def check(self, request: Request) -> None:
        """Completes a request's limits and refuses one that can never run.

        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, limits out of range, or a length that exceeds
                the model's positions or the whole cache.
        """
        prompt, model = request.prompt, self.model
        request.prompt_ids = self._checked_ids(prompt)
        room = model.max_positions - len(prompt)
        if request.max_new_tokens is None:
            room_in_cache = self.cache.num_blocks * self.cache.block_size - len(prompt)
            request.max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, room, room_in_cache))
        try:
            request.max_new_tokens = operator.index(request.max_new_tokens)
        except TypeError:
            raise ValueError(f"max_new_tokens must be a whole number, got {request.max_new_tokens!r}") from None
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {request.max_new_tokens}")
        if request.max_new_tokens > room:
            raise ValueError(
                f"a prompt of {len(prompt)} and {request.max_new_tokens} new tokens exceed the model's "
                f"{model.max_positions} positions"
            )
        self._check_fits(request.limit)

    def run(self, requests: Sequence[Request]) -> list[Generation]:
        """Runs every request; returns their answers in order. See FlashQwen2ForCausalLM.generate."""
        for request in requests:
            self.check(request)
        waiting = deque(requests)
        batch: DecodeBatch | None = None
        try:
            while waiting or batch is not None:
                admitted = self._prefill(waiting, len(batch.requests) if batch else 0)
                if not admitted:
                    assert batch is not None  # an empty engine admits any request that check() let pass
                    self._decode(batch)
                batch = self._regroup(batch, admitted)
        finally:
            for request in requests:
                self._release(request)
        return [self._generation(request) for request in requests]

    def compute_logits(self, token_lists: Sequence[list[int]]) -> list[torch.Tensor]:
        """See FlashQwen2ForCausalLM.compute_logits."""
        requests = []
        for tokens in token_lists:
            requests.append(Request(tokens, max_new_tokens=0, prompt_ids=self._checked_ids(tokens)))
            if len(tokens) > self.model.max_positions:
                raise ValueError(
                    f"a sequence of {len(tokens)} tokens exceeds the model's {self.model.max_positions} positions"
                )
            self._check_fits(len(tokens))
        results = []
        for request in requests:
            request.blocks = self.cache.allocate(self.cache.blocks_needed(len(request.prompt)))
            try:
                logits = self._prefill_logits([request], None)
                results.append(logits.to(choosing_device(logits.device)).float())
                self.model.settle()
            finally:
                self._release(request)
        return results

    def _checked_ids(self, tokens: list[int]) -> torch.Tensor:
        """Token ids as int64 on the host."""
        if not tokens:
            raise ValueError("a prompt must have at least one token, got none")
        if min(tokens) < 0 or max(tokens) >= self.model.vocab_size:
            outside = next(token for token in tokens if not 0 <= token < self.model.vocab_size)
            raise ValueError(f"token ids must be in [0, {self.model.vocab_size}), got {outside}")
        return torch.frombuffer(array("q", tokens), dtype=torch.int64)  # faster than a tensor from a list

    def _check_fits(self, tokens: int) -> None:
        needed = self.cache.blocks_needed(tokens)
        if needed > self.cache.num_blocks:
            raise ValueError(
                f"a request of {tokens} tokens needs {needed} cache blocks of {self.cache.block_size}, but the cache "
                f"has {self.cache.num_blocks}: raise num_blocks or cache_gb"
            )

    def _admit(self, waiting: deque[Request], running: int) -> list[Request]:
        """Takes from the front what fits the batch, the cache and one prefill; at least one if nothing runs."""
        admitted: list[Request] = []
        most = MAX_PREFILL_TOKENS_CUDA if self.model.device.type == "cuda" else MAX_PREFILL_TOKENS
        tokens = 0
        while waiting and running + len(admitted) < MAX_BATCH:
            request = waiting[0]
            needed = self.cache.blocks_needed(request.limit)
            tokens += len(request.prompt)
            if needed > self.cache.free_blocks or (admitted and tokens > most):
                break
            request.blocks = self.cache.allocate(needed)
            admitted.append(waiting.popleft())
        return admitted

    def _prefill_logits(self, requests: list[Request], rows: torch.Tensor | None) -> torch.Tensor:
        lengths = [len(request.prompt) for request in requests]
        positions = torch.arange(max(lengths))
        tables = _block_tables(requests)
        ids, positions, tables, slots, input_lengths, rows = upload(
            (
                torch.cat([request.prompt_ids for request in requests]),
                torch.cat([positions[:length] for length in lengths]),
                tables,
                self._slots(tables, lengths),
                torch.tensor(lengths, dtype=torch.int32),
                torch.arange(sum(lengths)) if rows is None else rows,
            ),
            self.model.device,
        )
        return self.model.forward(
            ids,
            positions,
            True,
            self.cache.pairs,
            tables,
            slots,
            input_lengths,
            max(lengths),
            rows,
            host_lengths=lengths,
        )

    def _slots(self, tables: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Where the tokens of prompts go in the cache, int32 [their sum]."""
        size = self.cache.block_size
        rows = (tables.unsqueeze(2) * size + torch.arange(size, dtype=torch.int32)).flatten(1)
        return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])

    def _prefill(self, waiting: deque[Request], running: int) -> list[Request]:
        """Runs the prompts of all that are admitted, a step after the other; returns these requests.

        A step is launched before the tokens of the one before it are read.
        """
        everybody: list[Request] = []
        behind: tuple[list[Request], Download | _Read] | None = None
        while admitted := self._admit(waiting, running + len(everybody)):
            ahead = (admitted, self._download(self.prefill_step(admitted)))
            if behind is not None:
                self._take(*behind)
            behind = ahead
            everybody += admitted
        if behind is not None:
            self._take(*behind)
        return everybody

    def prefill_step(self, requests: list[Request]) -> torch.Tensor:
        """Runs the prompts of admitted requests in one step, with sampling; returns the new tokens, int64 [B]."""
        lengths = torch.tensor([len(request.prompt) for request in requests])
        logits = self._prefill_logits(requests, lengths.cumsum(0) - 1)
        rows = sampling_rows([request.sampling for request in requests], self.model.device)
        return self._sampler.choose(logits, rows)

    def _decode(self, batch: DecodeBatch) -> None:
        """Decodes: one step, or on a GPU until a request ends.

        There a step is launched before the tokens of the one before it are read. A request that ends with an
        end-of-sequence token takes part in one more step, whose token is dropped.
        """
        going = min(request.limit - len(request.prompt) - len(request.new_tokens) for request in batch.requests)
        if batch.device.type != "cuda":
            going = 1
        behind = self._download(self.decode_step(batch))
        for _ in range(going - 1):
            ahead = self._download(self.decode_step(batch))
            self._take(batch.requests, behind)
            behind = ahead
            if any(request.finish_reason for request in batch.requests):
                break
        self._take(batch.requests, behind)

    def _take(self, requests: list[Request], tokens: Download | _Read) -> None:
        """Appends the tokens of a step to the requests that have not ended before it."""
        for request, token in zip(requests, tokens.wait(), strict=True):
            if not request.finish_reason:
                self._append(request, token)

    def decode_step(self, batch: DecodeBatch) -> torch.Tensor:
        """One decode step with sampling; returns the new tokens, int64 [B], and advances the batch."""
        positions, slots, lengths = batch.step_tensors()
        logits = self.model.forward(
            batch.ids,
            positions,
            False,
            self.cache.pairs,
            batch.tables,
            slots,
            lengths,
            0,
            host_lengths=batch.host_lengths,
        )
        tokens = self._sampler.choose(logits, batch.sampling)
        batch.advance(tokens)
        return tokens

    def _download(self, tokens: torch.Tensor) -> Download | _Read:
        """The tokens of a step, unless the step failed: what was chosen from its logits is then worth nothing."""
        if tokens.device.type == "cuda":
            return Download(tokens)
        read = _Read(tokens.tolist())
        self.model.settle()  # read first: then no launch is under way, and this waits for nothing
        return read

    def _append(self, request: Request, token: int) -> None:
        request.new_tokens.append(token)
        if token in self.model.stop_tokens and not request.ignore_eos:
            request.finish_reason = "stop"
        elif len(request.new_tokens) == request.max_new_tokens:
            request.finish_reason = "length"

    def _regroup(self, batch: DecodeBatch | None, admitted: list[Request]) -> DecodeBatch | None:
        """The batch of the next step: without what has finished, with what was admitted."""
        everybody = (batch.requests if batch else []) + admitted
        going = [request for request in everybody if not request.finish_reason]
        for request in everybody:
            if request.finish_reason:
                self._release(request)
        if not going:
            return None
        if batch is not None and len(going) == len(batch.requests) and not admitted:
            return batch
        return DecodeBatch(going, self.cache.block_size, self.model.device)

    def _release(self, request: Request) -> None:
        # Taken first: if an interrupt comes in between, blocks are lost rather than free twice.
        blocks, request.blocks = request.blocks, []
        self.cache.release(blocks)

    def _generation(self, request: Request) -> Generation:
        tokenizer = self.model.tokenizer
        text = None if tokenizer is None else tokenizer.decode(request.new_tokens, skip_special_tokens=True)
        return Generation(request.new_tokens, text, request.finish_reason)
