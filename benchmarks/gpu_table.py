"""Prints README's table of a GPU from files of `modeltorch bench --json`, or puts it into README.

    python benchmarks/gpu_table.py benchmarks/results/CARD.jsonl [--into README.md]

Beside our medians (least to most) stands which part they reach of the card's own limit, measured in the same run; then
three references of an NVIDIA H100 80GB HBM3: what this project set itself as a bar, what vLLM 0.26.0 took, and the
floor, which is the bytes of a step at that card's read-only rate, or its operations at the rate that cuBLAS sustains.
The last line of a file for a workload counts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from compare import read

BEGIN, END = "<!-- gpu table: made by benchmarks/gpu_table.py -->", "<!-- end of the gpu table -->"

ROWS = (
    ("7B decode, 1 x 512", "qwen2.5-7b", "decode_b1_ctx512", "5.0", "6.28", "4.49"),
    ("7B decode, 8 x 512", "qwen2.5-7b", "decode_b8_ctx512", "5.2", "6.46", "4.55"),
    ("7B decode, 32 x 512", "qwen2.5-7b", "decode_b32_ctx512", "5.6", "6.77", "4.78"),
    ("7B decode, 128 x 512", "qwen2.5-7b", "decode_b128_ctx512", "7.0", "8.21", "5.67"),
    ("7B decode, 1 x 8192", "qwen2.5-7b", "decode_b1_ctx8192", "5.2", "6.43", "4.63"),
    ("0.5B decode, 1 x 512", "qwen2.5-0.5b", "decode_b1_ctx512", "0.55", "2.59", "0.315"),
    ("0.5B decode, 8 x 512", "qwen2.5-0.5b", "decode_b8_ctx512", "0.70", "1.90", "0.329"),
    ("0.5B decode, 32 x 512", "qwen2.5-0.5b", "decode_b32_ctx512", "0.90", "2.07", "0.377"),
    ("0.5B decode, 128 x 512", "qwen2.5-0.5b", "decode_b128_ctx512", "1.40", "3.16", "0.568"),
    ("0.5B decode, 1 x 8192", "qwen2.5-0.5b", "decode_b1_ctx8192", "0.65", "1.86", "0.345"),
    ("7B prefill, 1 x 512", "qwen2.5-7b", "prefill_b1_s512", "12.0", "31.3", "9.4"),
    ("7B prefill, 1 x 2048", "qwen2.5-7b", "prefill_b1_s2048", "44", "49.5", "38.5"),
    ("7B prefill, 8 x 1024", "qwen2.5-7b", "prefill_b8_s1024", "173", "182", "152"),
    ("7B prefill, 1 x 8192", "qwen2.5-7b", "prefill_b1_s8192", "188", "195", "168"),
    ("0.5B prefill, 1 x 2048", "qwen2.5-0.5b", "prefill_b1_s2048", "4.0", "21.0", "2.30"),
    ("0.5B prefill, 1 x 8192", "qwen2.5-0.5b", "prefill_b1_s8192", "17", "27.0", "12.2"),
    ("7B, 256 requests, in s", "qwen2.5-7b", "serve_r256", "2.5", "2.91", "2.15"),
    ("0.5B, 256 requests, in s", "qwen2.5-0.5b", "serve_r256", "0.55", "0.90", "0.16"),
)
"""What a row is called, its model and workload, and its bar, vLLM's figure and the floor: ms, or s for requests."""


def _figure(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "not measured"
    if entry["runs"] == 1:
        return _figure(entry["value"])
    return f"{_figure(entry['value'])} ({_figure(entry['min'])} to {_figure(entry['max'])})"


def _of_limit(entry: dict[str, Any] | None) -> str:
    return f"{entry['fraction_of_limit']:.0%}" if entry is not None and "fraction_of_limit" in entry else ""


def table(paths: list[Path]) -> str:
    """The table and a line that says what was measured on what.

    Raises:
        ValueError: a file that is none of measurements, or nothing of the table in them.
    """
    measured: dict[tuple[str, str], dict[str, Any]] = {}
    for path in paths:
        for entry in read(path).values():
            if entry["device"] == "cuda" and entry["dtype"] == "bfloat16":
                measured[entry["model"], entry["workload"]] = entry
    used = []
    lines = [
        "| workload | modeltorch | of the limit | bar, H100 | vLLM 0.26, H100 | floor, H100 |",
        "|---|---|---|---|---|---|",
    ]
    for name, model, workload, *references in ROWS:
        found = measured.get((model, workload))
        if found is not None:
            used.append(found)
        lines.append(f"| {' | '.join([name, _cell(found), _of_limit(found), *references])} |")
    if not used:
        raise ValueError("no workload of the table was measured in bfloat16 on cuda")
    on = " and ".join(sorted({f"{entry['hardware']}, torch {entry['torch']}" for entry in used}))
    commits = " and ".join(sorted({entry["commit"] for entry in used}))
    return "\n".join([*lines, "", f"Measured on {on}, at commit {commits}.", ""])


def put_into(page: str, made: str) -> str:
    """A page with its table replaced.

    Raises:
        ValueError: the page has no place for it.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{made}{END}{after}"


def main() -> int:
    """Prints the table, or puts it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, help="the page whose table is replaced")
    arguments = parser.parse_args()
    try:
        made = table(arguments.results)
        if arguments.into is None:
            print(made, end="")
        else:
            arguments.into.write_text(put_into(arguments.into.read_text(), made))
    except (OSError, ValueError) as error:
        print(f"gpu_table: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
