"""Compares two files of `modeltorch bench --json`: how the time of each workload changed, and how sure that is.

    python benchmarks/compare.py OLD.jsonl NEW.jsonl

A ratio below 1 is faster. The range is what the spreads of both allow: from the new least over the old most to the
new most over the old least. A line whose range holds 1 shows no difference that these runs can tell.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

Key = tuple[str, ...]

KEYS = ("model", "device", "dtype", "workload")
TEXTS = (*KEYS, "unit", "hardware")
NUMBERS = ("value", "min", "max")


def _entry(line: str) -> dict[str, Any]:
    """A measurement of a line.

    Raises:
        ValueError: the line is none; says why.
    """
    entry = json.loads(line)
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, got {line}")
    for key in TEXTS:
        if not isinstance(entry.get(key), str):
            raise ValueError(f"{key} must be text, got {entry.get(key)!r}")
    for key in NUMBERS:
        number = entry.get(key)
        if not isinstance(number, (int, float)) or isinstance(number, bool) or not 0 < number <= sys.float_info.max:
            raise ValueError(f"{key} must be a number above 0, got {number!r}")
    if not entry["min"] <= entry["value"] <= entry["max"]:
        raise ValueError(f"value must lie from min to max, got {entry['value']}, {entry['min']} and {entry['max']}")
    return entry


def read(path: Path) -> dict[Key, dict[str, Any]]:
    """Measurements of time by (model, device, dtype, workload); of several in a file the last counts.

    Raises:
        ValueError: a line that is no measurement, or no measurement of time in the whole file.
    """
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            entry = _entry(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number} is no measurement of modeltorch bench: {error}") from error
        if entry["unit"] in ("ms", "s"):
            found[tuple(entry[key] for key in KEYS)] = entry
    if not found:
        raise ValueError(f"{path} holds no measurement of time")
    return found


def compare(old: dict[str, Any], new: dict[str, Any]) -> str:
    """A line: ratio of the medians, range, verdict."""
    least, most = new["min"] / old["max"], new["max"] / old["min"]
    verdict = "no difference" if least <= 1 <= most else ("faster" if most < 1 else "slower")
    times = f"{old['value']:10.5g} -> {new['value']:10.5g} {new['unit']:3}"
    return f"{times} {new['value'] / old['value']:6.3f} ({least:.3f} to {most:.3f}) {verdict}"


def main() -> int:
    """Prints a line for every workload that both files hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    arguments = parser.parse_args()
    try:
        old, new = read(arguments.old), read(arguments.new)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    shared = [key for key in old if key in new]
    for key in shared:
        print(f"{' '.join(key):48} {compare(old[key], new[key])}")
    for name, only in (("old", old.keys() - new.keys()), ("new", new.keys() - old.keys())):
        for key in sorted(only):
            print(f"{' '.join(key):48} only in the {name} file")
    if {entry["hardware"] for entry in old.values()} != {entry["hardware"] for entry in new.values()}:
        print("The files are from different hardware.")
    return 0 if shared else 2


if __name__ == "__main__":
    sys.exit(main())
