"""What every engine's script shares: the workloads, the prompts, the lines of JSON. Needs the standard library alone.

An engine's script is called by run.py, with the Python of the engine's own environment:

    python ENGINE_peer.py convert --checkpoint FOLDER --converted FOLDER --dtype DTYPE
    python ENGINE_peer.py measure --checkpoint FOLDER --converted FOLDER --dtype DTYPE --workloads NAME,NAME --threads 2
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKLOADS = (
    "prefill_b1_s128,prefill_b1_s512,prefill_b1_s2048,decode_b1_ctx128,decode_b1_ctx2048,decode_b8_ctx128,serve_r32"
)
REQUEST_PROMPT = (64, 256)
REQUEST_NEW_TOKENS = 64

_WARM_UP_STEPS = 4


@dataclass(frozen=True)
class Workload:
    """A workload by the name that `modeltorch bench` gives it.

    Attributes:
        kind: "prefill", "decode" or "serve".
        batch: sequences side by side, or requests.
        length: tokens of a prompt, or the mean context of the timed steps; 0 for serve.
    """

    name: str
    kind: str
    batch: int
    length: int

    @classmethod
    def parse(cls, name: str) -> Workload:
        """For example "prefill_b1_s512", "decode_b8_ctx128" or "serve_r32".

        Raises:
            ValueError: it is none of these.
        """
        found = re.fullmatch(r"(prefill)_b(\d+)_s(\d+)|(decode)_b(\d+)_ctx(\d+)|(serve)_r(\d+)", name)
        if found is None:
            raise ValueError(f"no workload is called {name!r}: there are {WORKLOADS}")
        kind, batch, *length = [group for group in found.groups() if group is not None]
        return cls(name, kind, int(batch), int(*length))


def prompts(vocab_size: int, lengths: Sequence[int]) -> list[list[int]]:
    """The prompts of `modeltorch bench`: random ids, the same on every call."""
    generator = random.Random(0)
    return [[generator.randrange(vocab_size) for _ in range(length)] for length in lengths]


def request_lengths(requests: int) -> list[int]:
    """The prompt lengths of `modeltorch bench --requests`."""
    generator = random.Random(0)
    return [generator.randint(*REQUEST_PROMPT) for _ in range(requests)]


class Peer(ABC):
    """An engine with a loaded model. All times are seconds of wall clock; sampling is greedy and no token ends early.

    Attributes:
        version: of the engine.
    """

    version: str

    @classmethod
    @abstractmethod
    def convert(cls, checkpoint: Path, converted: Path, dtype: str) -> None:
        """Brings a Hugging Face checkpoint into the engine's format; `converted` is an empty folder."""

    @abstractmethod
    def __init__(self, checkpoint: Path, converted: Path, dtype: str, threads: int) -> None:
        """Loads the model."""

    @abstractmethod
    def prefill(self, prompt: list[int], runs: int) -> list[float]:
        """Times of `runs` prefills of the prompt, after one that is not timed; logits of the last token only."""

    @abstractmethod
    def decode(self, prompts: list[list[int]], warm_up: int, steps: int) -> list[float]:
        """Times of `steps` decode steps of all sequences, after a prefill and `warm_up` steps that are not timed."""

    @abstractmethod
    def serve(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Time from handing all requests over to the last token of the last one, in the engine's own batching."""


def _timed(peer: Peer, workload: Workload, vocab_size: int, runs: int, steps: int) -> Iterator[dict[str, Any]]:
    if workload.kind == "serve":
        given = prompts(vocab_size, request_lengths(workload.batch))
        peer.serve(given, 2)  # what a first use of its memory costs is no part of it
        seconds = peer.serve(given, REQUEST_NEW_TOKENS)
        yield {"unit": "s", "value": seconds, "min": seconds, "max": seconds, "runs": 1}
        return
    if workload.kind == "prefill":
        (prompt,) = prompts(vocab_size, [workload.length])
        times = peer.prefill(prompt, runs)
    else:
        first = workload.length - steps // 2 - _WARM_UP_STEPS
        times = peer.decode(prompts(vocab_size, [first] * workload.batch), _WARM_UP_STEPS, steps)
    median, least, most, count = statistics.median(times), min(times), max(times), len(times)
    tokens = workload.batch * (workload.length if workload.kind == "prefill" else 1)
    yield {"unit": "ms", "value": median * 1e3, "min": least * 1e3, "max": most * 1e3, "runs": count}
    yield {"unit": "tok/s", "value": tokens / median, "min": tokens / most, "max": tokens / least, "runs": count}


def measure(peer: Peer, workloads: Sequence[str], vocab_size: int, runs: int, steps: int) -> Iterator[dict[str, Any]]:
    """A line for each measurement; one with a reason under "error" for a workload that the engine does not run."""
    for name in workloads:
        try:
            for line in _timed(peer, Workload.parse(name), vocab_size, runs, steps):
                yield {"workload": name, **line}
        except Exception as error:  # whatever an engine throws is the reason that the table shows
            yield {"workload": name, "error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.machine())


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line that every engine's script takes."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("action", choices=("convert", "measure"))
    made.add_argument("--checkpoint", type=Path, required=True)
    made.add_argument("--converted", type=Path, required=True)
    made.add_argument("--dtype", required=True)
    made.add_argument("--workloads", default=WORKLOADS)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--runs", type=int, default=3, help="timed prefills")
    made.add_argument("--steps", type=int, default=32, help="timed decode steps")
    return made


def main(peer_class: type[Peer], description: str | None) -> None:
    """Converts, or loads once and prints a line for each measurement."""
    given = parser(description).parse_args()
    if given.action == "convert":
        peer_class.convert(given.checkpoint, given.converted, given.dtype)
        return
    vocab_size = json.loads((given.checkpoint / "config.json").read_text())["vocab_size"]
    peer = peer_class(given.checkpoint, given.converted, given.dtype, given.threads)
    about = {"model": given.checkpoint.name, "device": "cpu", "hardware": f"{_processor()}, {given.threads} threads"}
    for line in measure(peer, given.workloads.split(","), vocab_size, given.runs, given.steps):
        print(json.dumps({**about, "dtype": given.dtype, **line, "version": peer.version}), flush=True)
