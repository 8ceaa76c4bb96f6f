# SPDX-License-Identifier: Apache-2.0
"""Train and evaluate the small Qwen2 checkpoint that ships with the package.

Train (one GPU; the figures in the checkpoint's README are from one H100):

    python tools/train_checkpoint.py --out modeltorch/checkpoints/arithmetic --minutes 6

Evaluate an existing checkpoint on held-out prompts, in float32 and in bfloat16:

    python tools/train_checkpoint.py --evaluate modeltorch/checkpoints/arithmetic

Training examples are drawn on the device, whole batches at a time, from a seeded generator. A
prompt that `modeltorch.arithmetic.is_held_out` names never enters a batch. The learning rate
follows the clock rather than a count of steps, so training ends when the minutes are over and the
number of steps depends on the machine.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeltorch import arithmetic

PAD, EOS, VOCABULARY = 256, 257, 258  # the tokens before these are the 256 bytes
PAD_TEXT, EOS_TEXT = "<|pad|>", "<|endoftext|>"
GAP = -1  # an unused cell of a row under construction
IGNORED = -100  # a target that the loss leaves out


class Batch(NamedTuple):
    """Right-padded token rows and, for each token, whether it belongs to the answer."""

    tokens: Tensor
    is_answer: Tensor

    def chunk(self, index: int, size: int) -> Batch:
        """Return the rows of one of the chunks of a size."""
        return Batch(*(part[index * size : (index + 1) * size] for part in self))

    def targets(self) -> Tensor:
        """Return the next token of every position but the last, where it is to be learned."""
        return self.tokens[:, 1:].masked_fill(~self.is_answer[:, 1:], IGNORED)


class Sampler:
    """Draws training examples as tensors; it mirrors `modeltorch.arithmetic.sample`.

    Part of the draws is made hard on purpose: sums with long carries, differences of numbers that
    share digits, long lists, and lists whose numbers lie close together.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        """Create a sampler whose draws depend on the seed and the kind of device alone."""
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)
        words = [list(word.rjust(7).encode()) for word in ("sort", "max", "reverse")]
        self.words = torch.tensor(words, device=device)
        self.words[self.words == ord(" ")] = GAP

    def pairs(self, count: int) -> Batch:
        """Draw sums and differences."""
        left, right = self._numbers((2, count), 4)
        minus = self._uniform(count) < 0.5
        # Hard draws: digits that add up to 9 or cancel, so that carries and borrows run far.
        powers = 10 ** torch.arange(4, device=self.device)
        wide = self._integers((count,), 0, 10_000)
        digits = wide[:, None] // powers % 10
        partner = torch.where(minus[:, None], digits, 9 - digits)
        partner = partner.where(self._uniform(count, 4) < 0.5, self._integers((count, 4), 0, 10))
        hard = self._uniform(count) < 0.4
        left = torch.where(hard, wide, left)
        right = torch.where(hard, (partner * powers).sum(1), right)

        result = torch.where(minus, left - right, left + right)
        prompt = [
            self._digits(left, 4),
            torch.where(minus, ord("-"), ord("+"))[:, None],
            self._digits(right, 4),
            self._column(ord("="), count),
        ]
        answer = [
            torch.where(result < 0, ord("-"), GAP)[:, None],
            self._digits(result.abs(), 5),
            self._column(EOS, count),
        ]
        return self._trained(prompt, answer, length=16)

    def lists(self, count: int) -> Batch:
        """Draw lists to sort, to reverse or to take the maximum of."""
        numbers = self._numbers((count, 6), 3)
        # Hard draws: numbers near a common one, so that the last digit decides; ties occur.
        near = numbers[:, :1] + self._integers((count, 6), 0, 15)
        hard = self._uniform(count, 1) < 0.25
        numbers = torch.where(hard, near.clamp(max=999), numbers)
        sizes = torch.maximum(self._integers((count,), 2, 7), self._integers((count,), 2, 7))
        index = torch.arange(6, device=self.device)
        present = index < sizes[:, None]

        draw = self._uniform(count)
        is_max, is_reverse = (draw < 0.2)[:, None], (draw > 0.75)[:, None]
        ordered = numbers.masked_fill(~present, 1000).sort(1).values
        backward = numbers.gather(1, (sizes[:, None] - 1 - index).clamp(min=0))
        largest = numbers.masked_fill(~present, 0).amax(1, keepdim=True).expand(-1, 6)
        results = torch.where(is_max, largest, torch.where(is_reverse, backward, ordered))
        shown = torch.where(is_max, index == 0, present)

        operation = is_max[:, 0].long() + 2 * is_reverse[:, 0].long()
        equals, end = self._column(ord("="), count), self._column(EOS, count)
        prompt = [self.words[operation], self._spaced(numbers, present), equals]
        answer = [self._spaced(results, shown)[:, 1:], end]
        return self._trained(prompt, answer, length=56)

    def held_out(self, batch: Batch) -> Tensor:
        """Evaluate `modeltorch.arithmetic.is_held_out` on every row's prompt."""
        mask = 0xFFFFFFFF
        in_prompt = ~batch.is_answer & (batch.tokens != PAD)
        value = torch.full((len(batch.tokens),), 0x811C9DC5, device=self.device)
        for byte, active in zip(batch.tokens.T, in_prompt.T, strict=True):
            value = torch.where(active, ((value ^ byte) * 0x01000193) & mask, value)
        value = ((value ^ (value >> 16)) * 0x85EBCA6B) & mask
        value = ((value ^ (value >> 13)) * 0xC2B2AE35) & mask
        return (value ^ (value >> 16)) % arithmetic.HELD_OUT_MODULUS == 0

    def batches(self, pair_rows: int, list_rows: int) -> Iterator[tuple[Batch, Batch]]:
        """Yield batches of pairs and of lists without end."""
        while True:
            pairs, lists = self.pairs(64 * pair_rows), self.lists(64 * list_rows)
            for index in range(60):  # about 2 of the 64 go with the rows that are held out
                yield pairs.chunk(index, pair_rows), lists.chunk(index, list_rows)

    def _trained(self, prompt: list[Tensor], answer: list[Tensor], length: int) -> Batch:
        """Join cells to rows, close the gaps, and drop the rows that are held out."""
        cells = torch.cat([*prompt, *answer], dim=1)
        is_gap = cells == GAP
        order = is_gap.byte().argsort(dim=1, stable=True)[:, :length]
        is_answer = torch.arange(cells.shape[1], device=self.device) >= sum(part.shape[1] for part in prompt)
        is_answer = (is_answer & ~is_gap).gather(1, order)
        batch = Batch(cells.masked_fill(is_gap, PAD).gather(1, order), is_answer)
        kept = ~self.held_out(batch)
        return Batch(batch.tokens[kept], batch.is_answer[kept])

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def _integers(self, shape: tuple[int, ...], low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def _numbers(self, shape: tuple[int, ...], max_digits: int) -> Tensor:
        """Draw numbers whose count of digits is uniform."""
        top = 10 ** self._integers(shape, 1, max_digits + 1)
        low = torch.where(top > 10, top // 10, 0)
        return (low + self._uniform(*shape).double() * (top - low)).long()

    def _digits(self, values: Tensor, width: int) -> Tensor:
        """Write each number to `width` cells, with gaps in front."""
        powers = 10 ** torch.arange(width - 1, -1, -1, device=self.device)
        digits = values[..., None] // powers % 10 + ord("0")
        return digits.masked_fill((values[..., None] < powers) & (powers > 1), GAP)

    def _spaced(self, numbers: Tensor, present: Tensor) -> Tensor:
        """Write each number that is present after a blank."""
        space = torch.full_like(numbers, ord(" "))[..., None]
        cells = torch.cat([space, self._digits(numbers, 3)], dim=2)
        return cells.masked_fill(~present[..., None], GAP).flatten(1)

    def _column(self, token: int, count: int) -> Tensor:
        return torch.full((count, 1), token, device=self.device)


def check_sampler(sampler: Sampler, tokenizer: Qwen2Tokenizer) -> None:
    """Compare the sampler's rows with `modeltorch.arithmetic`, the definition of the task."""
    for batch in (sampler.pairs(2000), sampler.lists(2000)):
        for tokens, is_answer in zip(batch.tokens.cpu(), batch.is_answer.cpu(), strict=True):
            prompt = tokenizer.decode(tokens[~is_answer & (tokens != PAD)])
            answer = tokenizer.decode(tokens[is_answer])
            if answer != arithmetic.solve(prompt) + EOS_TEXT or arithmetic.is_held_out(prompt):
                raise AssertionError(f"wrong training example: {prompt!r} {answer!r}")


def build_tokenizer() -> Qwen2Tokenizer:
    """Build the tokenizer: Qwen2's, with a token per byte, two special tokens and no merges.

    Text made of ASCII characters, as the task's is, thus has one token per character, whose
    number is the character's code. Other text survives too, at a token per byte of UTF-8.
    """
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = {byte: 256 + i for i, byte in enumerate(b for b in range(256) if b not in plain)}
    vocabulary = {chr(shifted.get(byte, byte)): byte for byte in range(256)}
    return Qwen2Tokenizer(
        vocab=vocabulary | {PAD_TEXT: PAD, EOS_TEXT: EOS},
        merges=[],
        pad_token=PAD_TEXT,
        eos_token=EOS_TEXT,
        unk_token=EOS_TEXT,
        padding_side="left",
        model_max_length=512,
    )


def build_model() -> Qwen2ForCausalLM:
    """Build the model with random weights."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=480,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=32, eos_token_id=EOS, pad_token_id=PAD)
    return model


def save(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Write the checkpoint folder, with the weights rounded to bfloat16."""
    rounded = Qwen2ForCausalLM(model.config)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = model.generation_config
    rounded.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(out: Path, minutes: float, args: argparse.Namespace) -> None:
    """Train for the given time and write the checkpoint, also once a minute on the way."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer, model = build_tokenizer(), build_model().to(device)
    sampler = Sampler(device, args.seed)
    check_sampler(sampler, tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    if args.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)

    start = saved = time.perf_counter()
    for step, batches in enumerate(sampler.batches(args.pair_rows, args.list_rows)):
        elapsed = time.perf_counter() - start
        progress = elapsed / (60 * minutes)
        if progress >= 1:
            break
        decay = 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / 300) * decay
        losses, exact = [], []
        for batch in batches:
            targets = batch.targets()
            with torch.autocast(device.type, torch.bfloat16):
                hidden = model.model(input_ids=batch.tokens[:, :-1], use_cache=False)[0]
                logits = model.lm_head(hidden)
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
            loss.backward()
            losses.append(loss.detach())
            right = (logits.detach().argmax(-1) == targets) | (targets == IGNORED)
            exact.append(right.all(1).float().mean())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 250 == 0:
            shown = [f"{value.item():.5f}" for value in (*losses, *exact)]
            print(f"step {step} {elapsed:.0f} s: loss {shown[:2]} exact {shown[2:]}", flush=True)
        if time.perf_counter() - saved > 60:
            save(model, tokenizer, out)
            saved = time.perf_counter()
    save(model, tokenizer, out)
    print(f"trained {step} steps in {time.perf_counter() - start:.0f} s", flush=True)


def evaluate(folder: Path, dtype: torch.dtype, count: int) -> float:
    """Generate greedily for held-out prompts and print the share of exact answers.

    Args:
        folder: The checkpoint folder.
        dtype: The type to compute in.
        count: The number of held-out prompts.

    Returns:
        The share of prompts whose whole answer, the end token included, is right.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("highest")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    by_length = defaultdict(list)  # rows of one length need no padding
    for index, example in enumerate(arithmetic.held_out_prompts(count)):
        by_length[len(example.prompt)].append((arithmetic.OPERATIONS[index % len(arithmetic.OPERATIONS)], example))
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for rows in by_length.values():
        encoded = tokenizer([example.prompt for _, example in rows], return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(
                input_ids=encoded["input_ids"].to(device),
                attention_mask=encoded["attention_mask"].to(device),
            )
        generated = output[:, encoded["input_ids"].shape[1] :]
        for (operation, example), row in zip(rows, generated, strict=True):
            text = tokenizer.decode(row).split(PAD_TEXT)[0]
            total[operation] += 1
            if text == example.answer + EOS_TEXT:
                right[operation] += 1
            else:
                print(f"  wrong: {example.prompt}{text} (expected {example.answer})")
    parts = ", ".join(f"{name} {right[name]}/{total[name]}" for name in total)
    accuracy = right.total() / count
    print(f"{dtype} on {device}: {right.total()}/{count} = {accuracy:.2%} ({parts})", flush=True)
    return accuracy


def main() -> None:
    """Read the command line, then train and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, help="train, and write the checkpoint here")
    action.add_argument("--evaluate", type=Path, help="only evaluate the checkpoint here")
    parser.add_argument("--minutes", type=float, default=6.0, help="time to train")
    parser.add_argument("--count", type=int, default=1000, help="held-out prompts to evaluate")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--pair-rows", type=int, default=4096, help="sums, differences a step")
    parser.add_argument("--list-rows", type=int, default=1024, help="lists a step")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        train(args.out, args.minutes, args)
    for dtype in (torch.float32, torch.bfloat16):
        evaluate(args.out or args.evaluate, dtype, args.count)


if __name__ == "__main__":
    main()
