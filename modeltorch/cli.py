"""The command line: `modeltorch generate` and `modeltorch bench`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from modeltorch import __version__

_MOST_REQUESTS = 1_000_000  # their prompts are all in memory

DEMO_PROMPTS = ("345+678=", "12-345=", "sort 31 4 15 9 26=", "max 271 828 182=")


def _numbers(text: str) -> list[int]:
    """A comma-separated list of whole numbers of at least 1; empty text is an empty list."""
    try:
        numbers = [int(part) for part in text.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}") from None
    if any(number < 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"expected numbers of at least 1, got {text!r}")
    return numbers


def _range(text: str) -> tuple[int, int]:
    """The least and the most of something."""
    numbers = _numbers(text)
    if len(numbers) != 2 or numbers[0] > numbers[1]:
        raise argparse.ArgumentTypeError(f"expected the least and the most, got {text!r}")
    return numbers[0], numbers[1]


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--cache-packed", action="store_true", help="keep packed weights in the checkpoint's folder")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="modeltorch", description="A native Qwen2 runner inside PyTorch.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="answer prompts")
    generate.add_argument("--model", help="checkpoint folder or hub id (default: the bundled arithmetic model)")
    generate.add_argument("--prompt", action="append", help="a prompt; repeatable (default: lines of standard input)")
    generate.add_argument("--max-new-tokens", type=int, help="most tokens of an answer (default: 256 or what fits)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    generate.add_argument("--top-k", type=int, default=0, help="draw among the k most probable tokens (default: all)")
    generate.add_argument("--top-p", type=float, default=1.0, help="draw among the tokens that reach this probability")
    generate.add_argument("--seed", type=int, help="draw the same tokens again")
    generate.add_argument("--ignore-eos", action="store_true", help="go on to --max-new-tokens")
    generate.add_argument("--json", action="store_true", help="one JSON object a line instead of text")
    _add_model_options(generate)

    bench = commands.add_parser("bench", help="measure prefill, decode and serving (all of it takes minutes)")
    model = bench.add_mutually_exclusive_group()
    model.add_argument("--shape", default="qwen2.5-0.5b", help="qwen2.5-0.5b, -1.5b or -7b with random weights")
    model.add_argument("--model", help="checkpoint folder or hub id instead of a shape")
    # None says that nothing was typed: a usual size that does not fit the model is left out, a typed one is refused.
    for option, what in (
        ("--prompt-len", "prompt lengths of the prefills (default: 128,512; '' for none)"),
        ("--prefill-batch", "their batches (default: 1,8)"),
        ("--context", "mean contexts of the decode steps (default: 128,2048; '' for none)"),
        ("--decode-batch", "their batches (default: 1,8)"),
    ):
        bench.add_argument(option, type=_numbers, metavar="N,N", help=what)
    bench.add_argument("--requests", type=int, help="requests to serve end to end (default: 256; 0 for none)")
    bench.add_argument("--request-prompt", type=_range, metavar="N,N", help="their prompt lengths (default: 64,512)")
    bench.add_argument("--request-new-tokens", type=int, help="new tokens of each (default: 128)")
    bench.add_argument("--runs", type=int, default=5, help="timed prefills (default: 5)")
    bench.add_argument("--json", metavar="FILE", help="append one JSON object a measurement to FILE")
    bench.add_argument("--nodes", metavar="FILE", help="append what each node of a step costs to FILE")
    _add_model_options(bench)
    return parser


def _read_prompts(given: Sequence[str] | None) -> list[str]:
    if given:
        return list(given)
    if sys.stdin.isatty():
        print("modeltorch: type prompts, one a line, and end with Ctrl-D", file=sys.stderr)
    return [line.rstrip("\r\n") for line in sys.stdin if line.strip()]


def _generate(arguments: argparse.Namespace) -> None:
    from modeltorch import checkpoint
    from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM

    prompts = _read_prompts(arguments.prompt)
    if not prompts:
        raise ValueError("no prompt: give --prompt or lines on standard input")
    model = FlashQwen2ForCausalLM.from_pretrained(
        checkpoint.BUNDLED if arguments.model is None else arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        cache_packed=arguments.cache_packed,
    )
    start = time.perf_counter()
    answers = model.generate(
        prompts,
        max_new_tokens=arguments.max_new_tokens,
        ignore_eos=arguments.ignore_eos,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    seconds = time.perf_counter() - start
    for prompt, answer in zip(prompts, answers, strict=True):
        if arguments.json:
            line = {
                "prompt": prompt,
                "text": answer.text,
                "token_ids": answer.token_ids,
                "finish_reason": answer.finish_reason,
            }
            print(json.dumps(line))
        else:
            shown = answer.text if answer.text is not None else " ".join(map(str, answer.token_ids))
            print(f"{prompt} {shown}")
    tokens = sum(len(answer.token_ids) for answer in answers)
    rate = f"{tokens / seconds:.1f} tokens/s"
    print(f"modeltorch: {tokens} new tokens for {len(prompts)} prompts in {seconds:.3f} s, {rate}", file=sys.stderr)


@contextlib.contextmanager
def _json_lines(path: str | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What appends an object to a file as a line of its own; without a file it drops them."""
    if path is None:
        yield lambda _: None
        return
    with Path(path).open("a") as file:

        def append(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        yield append


def _bench(arguments: argparse.Namespace) -> None:
    from modeltorch import bench, node_costs
    from modeltorch.subject import Subject

    for option, value, least in (
        ("--runs", arguments.runs, 1),
        ("--requests", arguments.requests, 0),
        ("--request-new-tokens", arguments.request_new_tokens, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{option} must be at least {least}, got {value}")
    if arguments.requests is not None and arguments.requests > _MOST_REQUESTS:
        raise ValueError(f"--requests must be at most {_MOST_REQUESTS}, got {arguments.requests}")
    if arguments.model is not None:
        subject = Subject.from_checkpoint(
            arguments.model, arguments.device, arguments.dtype, cache_packed=arguments.cache_packed
        )
    elif arguments.cache_packed:
        raise ValueError("--cache-packed needs --model: a shape with random weights has no folder")
    else:
        subject = Subject.from_shape(arguments.shape, arguments.device, arguments.dtype)
    workloads, left_out = bench.plan(
        subject,
        prompt_lengths=arguments.prompt_len,
        prefill_batches=arguments.prefill_batch,
        contexts=arguments.context,
        decode_batches=arguments.decode_batch,
        requests=arguments.requests,
        runs=arguments.runs,
        request_prompt=arguments.request_prompt,
        request_new_tokens=arguments.request_new_tokens,
    )
    if left_out:
        names = ", ".join(workload.name for workload in left_out)
        room = f"{subject.model.max_positions} positions or its cache"
        print(f"modeltorch: left out, because they do not fit the model's {room}: {names}", file=sys.stderr)
    if arguments.nodes:
        node_costs.check_device(subject.model.device)
    # Opened first: a file that cannot be written is told before minutes of measuring.
    with _json_lines(arguments.json) as append_result, _json_lines(arguments.nodes) as append_nodes:
        for result in (result for workload in workloads for result in workload.run()):
            print(result.row(), flush=True)
            append_result(result.as_json())
        for workload in workloads if arguments.nodes else ():
            if workload.step is not None:
                append_nodes(node_costs.report(subject, workload))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 2 for a user's mistake and 1 for a failure, told in one line."""
    import torch

    arguments = build_parser().parse_args(argv)
    try:
        if arguments.threads is not None:
            most = os.cpu_count() or 1
            if not 1 <= arguments.threads <= most:
                raise ValueError(f"--threads must be from 1 to {most}, got {arguments.threads}")
            torch.set_num_threads(arguments.threads)
        {"generate": _generate, "bench": _bench}[arguments.command](arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130  # 128 and the number of SIGINT, as shells count
    except BrokenPipeError:
        # Whoever read the answers has gone; the interpreter shall not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        print(f"modeltorch: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        # Memory that ran out, a device that failed, or a bug of ours: one line too, but with the place it came from.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split("Exception raised from")[0].split()) or "no message"
        place = f"{Path(frame.filename).name}:{frame.lineno}, {frame.name}"
        print(f"modeltorch: {said} ({type(error).__name__} at {place})", file=sys.stderr)
        return 1
    return 0
