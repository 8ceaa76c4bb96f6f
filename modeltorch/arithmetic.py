# SPDX-License-Identifier: Apache-2.0
"""The task of the checkpoint shipped with this package: exact answers to short prompts.

A prompt is a line of text that ends in ``=``; the model continues it with the answer:

==========  ==============================================  ======================
operation   prompt                                          answer
==========  ==============================================  ======================
sum         ``345+678=``  (two numbers of 1 to 4 digits)    ``1023``
difference  ``12-345=``  (two numbers of 1 to 4 digits)     ``-333``
sort        ``sort 31 4 15=``  (2 to 6 numbers of 1 to 3    ``4 15 31``
            digits)
max         ``max 31 4 15=``  (likewise)                    ``31``
reverse     ``reverse 31 4 15=``  (likewise)                ``15 4 31``
==========  ==============================================  ======================

Every prompt has one right answer, so a generated text can be checked exactly. One prompt in
`HELD_OUT_MODULUS`, chosen by a hash of its text, is held out: the training script never trains
on it, and `held_out_prompts` draws only such prompts.

This module uses the standard library alone.
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple

OPERATIONS: tuple[str, ...] = ("sum", "difference", "sort", "max", "reverse")
"""The names of the operations."""

ALPHABET: str = "0123456789+-= aemorstvx"
"""Every character that a prompt or an answer can hold."""

HELD_OUT_MODULUS: int = 32
"""A prompt is held out if its hash is a multiple of this number."""

_PAIR = re.compile(r"(0|[1-9]\d{0,3})([+-])(0|[1-9]\d{0,3})=", re.ASCII)
_LIST = re.compile(r"(sort|max|reverse)((?: (?:0|[1-9]\d{0,2})){2,6})=", re.ASCII)


class Example(NamedTuple):
    """A prompt and its only right answer.

    Attributes:
        prompt: The text given to the model; it ends in ``=``.
        answer: The text that the model should generate before its end token.
    """

    prompt: str
    answer: str


def solve(prompt: str) -> str:
    """Compute the exact answer to a prompt.

    Args:
        prompt: A prompt in the form shown at the top of this module.

    Returns:
        The answer, without the end token.

    Raises:
        ValueError: If the prompt is none that the task defines.
    """
    if match := _PAIR.fullmatch(prompt):
        left, right = int(match[1]), int(match[3])
        return str(left + right if match[2] == "+" else left - right)
    if match := _LIST.fullmatch(prompt):
        numbers = match[2].split()
        if match[1] == "sort":
            return " ".join(sorted(numbers, key=int))
        if match[1] == "max":
            return max(numbers, key=int)
        return " ".join(reversed(numbers))
    raise ValueError(f"not a prompt of the arithmetic task: {prompt!r}")


def prompt_hash(prompt: str) -> int:
    """Hash a prompt's text to 32 bits, the same in every process and on every machine.

    This is FNV-1a followed by the final mix of MurmurHash3. Both need 32-bit integer
    arithmetic alone, so the training script can evaluate them for whole batches at once.

    Args:
        prompt: The text to hash.

    Returns:
        An integer in ``[0, 2**32)``.
    """
    value = 0x811C9DC5
    for byte in prompt.encode():
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return value ^ (value >> 16)


def is_held_out(prompt: str) -> bool:
    """Tell whether a prompt is kept out of the training data.

    Args:
        prompt: The text of the prompt.

    Returns:
        True for about one prompt in `HELD_OUT_MODULUS`, always the same ones.
    """
    return prompt_hash(prompt) % HELD_OUT_MODULUS == 0


def sample(rng: random.Random, operation: str | None = None) -> Example:
    """Draw one example, held out or not.

    The number of digits of each number and the length of each list are uniform.

    Args:
        rng: The source of randomness; equal states give equal examples.
        operation: One of `OPERATIONS`, or None to draw it uniformly.

    Returns:
        The prompt and its answer.

    Raises:
        ValueError: If `operation` is not in `OPERATIONS`.
    """
    if operation is None:
        operation = rng.choice(OPERATIONS)
    if operation in ("sum", "difference"):
        sign = "+" if operation == "sum" else "-"
        prompt = f"{_number(rng, 4)}{sign}{_number(rng, 4)}="
    elif operation in OPERATIONS:
        numbers = [str(_number(rng, 3)) for _ in range(rng.randint(2, 6))]
        prompt = f"{operation} {' '.join(numbers)}="
    else:
        raise ValueError(f"unknown operation {operation!r}; known are {', '.join(OPERATIONS)}")
    return Example(prompt, solve(prompt))


def held_out_prompts(count: int, seed: int = 0, operation: str | None = None) -> list[Example]:
    """Draw distinct examples that the shipped checkpoint was not trained on.

    The operations take turns, so that each has an equal share. A shorter list with the same
    arguments is the beginning of a longer one.

    Args:
        count: The number of examples.
        seed: The seed of the draw.
        operation: One of `OPERATIONS` to draw it alone, or None for all in turn.

    Returns:
        `count` examples with different prompts, all held out.
    """
    rng = random.Random(seed)
    examples: list[Example] = []
    seen: set[str] = set()
    while len(examples) < count:
        turn = operation or OPERATIONS[len(examples) % len(OPERATIONS)]
        example = sample(rng, turn)
        if is_held_out(example.prompt) and example.prompt not in seen:
            seen.add(example.prompt)
            examples.append(example)
    return examples


def _number(rng: random.Random, max_digits: int) -> int:
    """Draw a number whose count of digits is uniform in ``[1, max_digits]``."""
    digits = rng.randint(1, max_digits)
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)
