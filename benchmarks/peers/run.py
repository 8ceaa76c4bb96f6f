"""modeltorch beside the engines that a user would pick instead, in turn, in one run.

    python benchmarks/peers/run.py --shape qwen2.5-0.5b,qwen2.5-1.5b --threads 2 --rounds 3 --json FILE
    python benchmarks/peers/run.py --table FILE

Sets up each engine's environment under build/peers (minutes, the first time), makes one checkpoint a shape and each
engine's form of it, then measures: in each round every engine once, in a process of its own. Appends one JSON object
a measurement to FILE and prints the table of ratios.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engines import ENGINES, Engine, clean_environment, set_up
from harness import WORKLOADS, Workload
from table import read, rows

_HERE = Path(__file__).parent
_BUILD = _HERE.parent.parent / "build" / "peers"


def prepare(engine: Engine, shape: str, jobs: int) -> list[str]:
    """The command that measures an engine, once its environment and its form of the checkpoint are there.

    Raises:
        RuntimeError: what is missing, or what failed.
    """
    python = sys.executable if engine.environment is None else str(set_up(engine.environment, _BUILD, jobs))
    checkpoint = _BUILD / "checkpoints" / shape
    made = checkpoint / "made"
    if not made.exists():
        subprocess.run([sys.executable, str(_HERE / "checkpoint.py"), shape, str(checkpoint)], check=True)
        made.touch()
    converted = _BUILD / "converted" / engine.key / shape
    folders = ["--checkpoint", str(checkpoint), "--converted", str(converted), "--dtype", engine.dtype]
    command = [python, str(_HERE / engine.script), "measure", *folders]
    if not (converted / "converted").exists():
        converted.mkdir(parents=True, exist_ok=True)
        execute(engine, ["convert" if part == "measure" else part for part in command])
        (converted / "converted").touch()
    return command


def execute(engine: Engine, command: Sequence[str]) -> str:
    """What an engine's script printed.

    Raises:
        RuntimeError: how it ended, if not well; with what it printed as its second argument.
    """
    print(f"+ {engine.label} {command[2]}", file=sys.stderr, flush=True)
    environment = None if engine.environment is None else clean_environment()
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        last = " ".join(run.stderr.strip().splitlines()[-1:])
        raise RuntimeError(f"its process ended with {run.returncode}: {last[:300]}", run.stdout)
    return run.stdout


def measure(engine: Engine, command: Sequence[str], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """An engine's lines of a round; for a workload without one, the reason."""
    reason = "its process wrote nothing about it"
    try:
        printed = execute(engine, command)
    except RuntimeError as error:
        reason, printed = error.args
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"model"')]
    yield from lines
    for name in names:
        if name not in {line["workload"] for line in lines}:
            yield {"workload": name, "error": reason}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-0.5b", metavar="NAME,NAME")
    parser.add_argument("--workloads", default=WORKLOADS, metavar="NAME,NAME", help=f"default: {WORKLOADS}")
    parser.add_argument(
        "--engines",
        metavar="NAME,NAME",
        help="only these beside modeltorch, for example ctranslate2 or ctranslate2-int8 (default: all)",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=3, help="timed prefills in a round")
    parser.add_argument("--steps", type=int, default=32, help="timed decode steps of the others in a round")
    parser.add_argument("--jobs", type=int, default=1, help="compiler processes while llama.cpp is built")
    parser.add_argument("--json", type=Path, default=_BUILD / "peers.jsonl", metavar="FILE", help="appended to")
    parser.add_argument("--prepare", action="store_true", help="set everything up and measure nothing")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of an earlier run")
    return parser.parse_args()


def main() -> None:
    """Prepares all, measures in turn, prints the table."""
    given = parse()
    if given.table:
        print("\n".join(rows(read(given.table))))
        return
    names = [Workload.parse(name).name for name in given.workloads.split(",")]
    wanted = None if given.engines is None else ["modeltorch", *given.engines.split(",")]
    engines = [engine for engine in ENGINES if wanted is None or engine.name in wanted or engine.key in wanted]
    options = ["--workloads", given.workloads, "--threads", str(given.threads), "--runs", str(given.runs)]
    commands: dict[tuple[str, str], list[str] | str] = {}
    for shape in given.shape.split(","):
        for engine in engines:
            try:
                command = prepare(engine, shape, given.jobs)
                commands[shape, engine.label] = [*command, *options, "--steps", str(given.steps)]
            except RuntimeError as error:
                commands[shape, engine.label] = f"not set up: {error.args[0]}"
                print(f"{engine.label}: {error.args[0]}", file=sys.stderr)
    lines = []
    earlier = read(given.json) if given.json.exists() else []
    start = 1 + max((line["round"] for line in earlier), default=-1)
    with given.json.open("a") as file:
        for turn in range(start, start + (0 if given.prepare else given.rounds)):
            first = turn % len(engines)  # so that no engine is always the first or always follows the same pause
            for shape in given.shape.split(","):
                for engine in (*engines[first:], *engines[:first]):
                    prepared = commands[shape, engine.label]
                    failed = [{"workload": name, "error": prepared} for name in names]
                    about = {"model": shape, "device": "cpu", "dtype": engine.dtype}
                    for line in failed if isinstance(prepared, str) else measure(engine, prepared, names):
                        lines.append({**about, **line, "engine": engine.name, "round": turn})
                        file.write(json.dumps(lines[-1]) + "\n")
                        file.flush()
    print("\n".join(rows(lines)))


if __name__ == "__main__":
    main()
