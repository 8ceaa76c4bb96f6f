"""Chooses the next token from logits."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from modeltorch.transfer import upload

_MIN_TEMPERATURE = 1e-6
_MOST_PLANNED = 64


@dataclass
class Sampling:
    """How the tokens of one request are chosen.

    Attributes:
        temperature: 0 is greedy; otherwise tokens are drawn from softmax(logits / temperature).
        top_k: draw among the k most probable tokens only; 0: among all.
        top_p: draw among the most probable tokens that together reach this probability, after top_k.
        seed: the same seed draws the same tokens whatever else is in the batch; None: torch's generator draws.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, numbers.Real) or not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or a positive number, got {self.temperature!r}")
        if not isinstance(self.top_p, numbers.Real) or not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p!r}")
        self.top_k = _whole_number("top_k", self.top_k, 0)
        if self.seed is not None:
            self.seed = _whole_number("seed", self.seed, 0)


def _whole_number(name: str, value: int, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None
    if not least <= number < 2**63:
        raise ValueError(f"{name} must be in [{least}, 2**63), got {number}")
    return number


def choosing_device(device: torch.device) -> torch.device:
    """Where the tokens of a model on `device` are chosen: there, but on the host for npu.

    What a step takes and gives beside logits is a few numbers. torch's own operators on npu tensors would each be
    compiled and launched for them, and need the vendor's operator library, which nothing else here needs.
    """
    return torch.device("cpu") if device.type == "npu" else device


class SamplingRows:
    """The sampling of every row of a batch, as tensors where its tokens are chosen.

    Attributes:
        has_greedy: some row is.
        temperatures: float32 [B]; a row of 0 is greedy.
        top_k: int64 [B], or None where no row has it.
        top_p: float64 [B], or None where no row has it.
        limited: bool [B, 1], rows that have one of the two.
        all_limited: every row has.
    """

    def __init__(self, samplings: Sequence[Sampling], device: torch.device, drawn: Sequence[int] | None = None) -> None:
        """Takes how rows are sampled, and how many tokens each has drawn before (None: no row has)."""
        self._device = choosing_device(device)
        temperatures = torch.tensor([float(sampling.temperature) for sampling in samplings])
        # What no row reaches stands for no limit.
        top_k = torch.tensor([sampling.top_k or 2**63 - 1 for sampling in samplings])
        limits = [sampling.top_p if sampling.top_p < 1.0 else 2.0 for sampling in samplings]
        top_p = torch.tensor(limits, dtype=torch.float64)
        self.has_greedy = any(sampling.temperature == 0.0 for sampling in samplings)
        self.all_limited = all(sampling.top_k > 0 or sampling.top_p < 1.0 for sampling in samplings)
        limited = torch.tensor([[sampling.top_k > 0 or sampling.top_p < 1.0] for sampling in samplings])
        self.temperatures, on_device_k, on_device_p, self.limited = upload(
            (temperatures, top_k, top_p, limited), self._device
        )
        self.top_k = on_device_k if any(sampling.top_k > 0 for sampling in samplings) else None
        self.top_p = on_device_p if any(sampling.top_p < 1.0 for sampling in samplings) else None
        self._has_seed = torch.tensor([sampling.seed is not None for sampling in samplings])
        self._seeds = torch.tensor([sampling.seed or 0 for sampling in samplings])
        self._drawn = torch.zeros_like(self._seeds) if drawn is None else torch.tensor(drawn)
        self._planned = torch.empty(0, len(samplings))
        self._step = 0

    def uniforms(self) -> torch.Tensor:
        """float64 [B, 1] in [0, 1) for the next token of each row.

        That of a row with a seed depends on the seed and on how many tokens the row has drawn alone. Numbers are made
        on the host and copied for several tokens at once, each time for more.
        """
        if self._step == len(self._planned):
            steps = min(_MOST_PLANNED, max(1, 2 * self._step))
            numbers = torch.rand(steps, len(self._seeds), dtype=torch.float64)
            if self._has_seed.any():
                counts = self._drawn + torch.arange(steps).unsqueeze(1)
                numbers = torch.where(self._has_seed, _seeded_uniforms(self._seeds, counts), numbers)
            (self._planned,) = upload((numbers,), self._device)
            self._drawn, self._step = self._drawn + steps, 0
        self._step += 1
        return self._planned[self._step - 1].unsqueeze(1)


def _seeded_uniforms(seeds: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Number counts[...] of the sequence of each seed: SplitMix64 (Steele, Lea, Flood 2014), the top 53 bits."""
    mixed = _mixed(_mixed(seeds) + (counts + 1) * -0x61C8864680B583EB)
    return _shifted(mixed, 11).double() * 2.0**-53


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    bits = (bits ^ _shifted(bits, 30)) * -0x40A7B892E31B1A47
    bits = (bits ^ _shifted(bits, 27)) * -0x6B2FB644ECCEEE15
    return bits ^ _shifted(bits, 31)


def _shifted(bits: torch.Tensor, places: int) -> torch.Tensor:
    """Unsigned 64-bit numbers shifted right."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def sampling_rows(
    samplings: Sequence[Sampling], device: torch.device, drawn: Sequence[int] | None = None
) -> SamplingRows | None:
    """The rows of a batch; None where all of them are greedy. Arguments are those of SamplingRows."""
    if all(sampling.temperature == 0.0 for sampling in samplings):
        return None
    return SamplingRows(samplings, device, drawn)


class Sampler:
    """Chooses one token a row (where: choosing_device)."""

    def __init__(self) -> None:
        self._argmax = torch.classes.ModelTorch.Operation("ArgmaxRows", {})

    def choose(self, logits: torch.Tensor, rows: SamplingRows | None) -> torch.Tensor:
        """One token a row.

        Args:
            logits: [B, vocab], any float dtype.
            rows: how each row is sampled; None: every row is greedy.

        Returns:
            int64 [B].
        """
        logits = logits.to(choosing_device(logits.device))
        if rows is None:
            return self._greedy(logits)
        safe = rows.temperatures.clamp(min=_MIN_TEMPERATURE).unsqueeze(1)
        probabilities = torch.softmax(logits.float() / safe, dim=-1)
        uniforms = rows.uniforms()
        if rows.top_k is None and rows.top_p is None:
            drawn = _draw(probabilities, uniforms)
        else:
            ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
            drawn = tokens.gather(1, _draw(_most_probable(ordered, rows), uniforms))
            if not rows.all_limited:
                drawn = torch.where(rows.limited, drawn, _draw(probabilities, uniforms))
        drawn = drawn.squeeze(1)
        return torch.where(rows.temperatures > 0, drawn, self._greedy(logits)) if rows.has_greedy else drawn

    def _greedy(self, logits: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self._argmax.run([logits])[0]
        return tokens


def _most_probable(ordered: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Probabilities [B, vocab] in falling order, with zeros for what top_k and top_p leave out."""
    if rows.top_k is not None:
        places = torch.arange(ordered.shape[1], device=ordered.device)
        ordered = ordered.masked_fill(places >= rows.top_k.unsqueeze(1), 0.0)
    if rows.top_p is not None:
        sums = ordered.cumsum(dim=-1, dtype=torch.float64)
        before = sums - ordered
        ordered = ordered.masked_fill(before >= rows.top_p.unsqueeze(1) * sums[:, -1:], 0.0)
    return ordered


def _draw(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """One column a row, int64 [B, 1], with a probability in proportion to its weight: the inverse distribution."""
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    below_total = torch.nextafter(sums[:, -1:], torch.zeros_like(sums[:, -1:]))
    places = torch.searchsorted(sums, torch.minimum(uniforms * sums[:, -1:], below_total), right=True)
    return places.clamp(max=weights.shape[1] - 1)  # only NaN comes out above
