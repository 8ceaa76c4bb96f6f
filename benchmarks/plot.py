"""Draws a picture for each workload of a file of `modeltorch bench --nodes`: the nodes of its step against the roofs.

    modeltorch bench --shape qwen2.5-0.5b --requests 0 --nodes nodes.jsonl
    python benchmarks/plot.py nodes.jsonl --out pictures

Nodes that differ by their layer alone are one. Left, what each reaches over the operations that it does for a byte,
under the rates that were measured beside it: reading memory, and multiplying with torch's library. Right, its time in
the step, and in it the time that its bytes and its operations take at those rates; what is left over is the gap. A node
that is shorter than its bytes has found them in the caches.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST = 12
"""Kinds of nodes that are drawn, by their time; the rest is one bar."""


@dataclass
class Kind:
    """The nodes of a step that differ by their layer alone.

    Attributes:
        name: without the layer, "mlp.down".
        operation: what they compute.
        count: how many.
        us: microseconds of all of them.
        moved: bytes that all of them must move.
        flops: operations of all of them.
    """

    name: str
    operation: str
    count: int = 0
    us: float = 0.0
    moved: int = 0
    flops: int = 0

    def add(self, other: Kind) -> None:
        """Takes other nodes in."""
        self.count += other.count
        self.us += other.us
        self.moved += other.moved
        self.flops += other.flops


def kinds(nodes: list[dict[str, Any]]) -> list[Kind]:
    """The kinds of nodes of a step, those that take longest first; beyond MOST of them one stands for the rest."""
    found: dict[tuple[str, str], Kind] = {}
    for node in nodes:
        key = re.sub(r"^layers\.\d+\.", "", node["name"]), node["operation"]
        found.setdefault(key, Kind(*key)).add(Kind(*key, 1, node["us"], node["bytes"], node["flops"]))
    ordered = sorted(found.values(), key=lambda kind: -kind.us)
    if len(ordered) <= MOST + 1:
        return ordered
    rest = Kind("the rest", "")
    for kind in ordered[MOST:]:
        rest.add(kind)
    return [*ordered[:MOST], rest]


def _draw_roofs(axes: Any, step: dict[str, Any], drawn: list[Kind]) -> None:
    """What nodes with products reach, over their operations a byte; a point's area is its share of the step."""
    read, multiply = step["read_gb_s"], step["multiply_gflop_s"]
    points = [kind for kind in drawn if kind.flops]
    total = sum(kind.us for kind in drawn)
    for kind in points:
        x, y = kind.flops / kind.moved, kind.flops / kind.us / 1e3
        axes.scatter(x, y, s=20 + 600 * kind.us / total, alpha=0.6, edgecolors="none")
        axes.annotate(kind.name, (x, y), fontsize=8, xytext=(4, 4), textcoords="offset points")
    ridge = multiply / read
    left = min([ridge / 10, *(kind.flops / kind.moved / 2 for kind in points)])
    right = max([ridge * 4, *(kind.flops / kind.moved * 2 for kind in points)])
    axes.plot([left, ridge, right], [left * read, multiply, multiply], color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s")
    axes.set_title(f"reads {read:.0f} GB/s, multiplies {multiply:.0f} GFLOP/s", fontsize=9)
    axes.grid(True, which="major", linewidth=0.3)


def _draw_times(axes: Any, step: dict[str, Any], drawn: list[Kind]) -> None:
    """Each kind's time in the step, and in it the time of its bytes and of its operations at the measured rates."""
    places = range(len(drawn))
    axes.barh(places, [kind.us / 1e3 for kind in drawn], color="0.8", label="measured")
    for offset, color, label, times in (
        (-0.2, "tab:blue", "its bytes", [kind.moved / step["read_gb_s"] / 1e6 for kind in drawn]),
        (0.2, "tab:orange", "its operations", [kind.flops / step["multiply_gflop_s"] / 1e6 for kind in drawn]),
    ):
        axes.barh([place + offset for place in places], times, height=0.25, color=color, label=label)
    axes.set_yticks(list(places), [f"{kind.name} x {kind.count}" for kind in drawn], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of a step")
    axes.set_title(f"nodes: {sum(kind.us for kind in drawn) / 1e3:.3g} ms", fontsize=9)
    axes.legend(fontsize=8, loc="lower right")


def draw(step: dict[str, Any], folder: Path) -> Path:
    """Draws a line of the file; returns the picture's path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    roofs, times = figure.subplots(1, 2)
    drawn = kinds(step["nodes"])
    _draw_roofs(roofs, step, drawn)
    _draw_times(times, step, drawn)
    figure.suptitle(
        f"{step['model']}, {step['workload']}, {step['dtype']}: {step['hardware']}, torch {step['torch']}, "
        f"commit {step['commit']}",
        fontsize=9,
    )
    path = folder / f"{step['model']}-{step['workload']}-{step['device']}.png"
    figure.savefig(path, dpi=90)
    return path


def main() -> int:
    """Draws every line of the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the pictures")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        for path in arguments.files:
            for line in path.read_text().splitlines():
                print(draw(json.loads(line), arguments.out))
    except ImportError as error:
        print(f"plot: {error}: install the extra [plot]", file=sys.stderr)
        return 2
    except (OSError, ValueError, KeyError) as error:
        print(f"plot: no file of modeltorch bench --nodes: {error!r}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
