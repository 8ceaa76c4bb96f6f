"""Chooses the next token from logits."""

from __future__ import annotations

import torch


def sample(logits: torch.Tensor, temperatures: torch.Tensor | None) -> torch.Tensor:
    """One token a row.

    Args:
        logits: [batch, vocab], any float dtype.
        temperatures: [batch] float32; a row of 0 is greedy. None: every row is greedy.

    Returns:
        int64 [batch].
    """
    greedy = logits.argmax(dim=-1)
    if temperatures is None:
        return greedy
    safe = temperatures.clamp(min=1e-6).unsqueeze(1)
    probabilities = torch.softmax(logits.float() / safe, dim=-1)
    drawn = torch.multinomial(probabilities, num_samples=1).squeeze(1)
    return torch.where(temperatures > 0, drawn, greedy)
