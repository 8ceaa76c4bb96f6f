"""The table of ratios: modeltorch over the best of the other engines, for each workload."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MINE = "modeltorch"
QUANTISED = ("int4", "int8")
"""Weights of fewer bits than modeltorch's: shown, and compared apart."""


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class Cell:
    """What one engine reached on one workload over all rounds, in milliseconds or, for requests, seconds."""

    value: float
    least: float
    most: float
    unit: str
    rounds: int
    fraction_of_limit: float | None = None

    def __str__(self) -> str:
        return f"{_figure(self.value)} ({_figure(self.least)} to {_figure(self.most)}; {self.rounds})"


Table = dict[tuple[str, str], dict[str, "Cell | str"]]
"""By (model, workload), then by engine and precision: a cell, or why there is none."""


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def cells(lines: Iterable[dict[str, Any]]) -> Table:
    """Medians over rounds, with the least and the most of them; an engine that failed in any round has no cell."""
    taken: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for line in lines:
        if "error" in line or line["unit"] in ("ms", "s"):
            engines = taken.setdefault((line["model"], line["workload"]), {})
            engines.setdefault(f"{line['engine']} {line['dtype']}", []).append(line)
    return {key: {label: _cell(rounds) for label, rounds in engines.items()} for key, engines in taken.items()}


def _cell(rounds: Sequence[dict[str, Any]]) -> Cell | str:
    errors = [str(line["error"]) for line in rounds if "error" in line]
    if errors:
        return errors[0]
    values = [line["value"] for line in rounds]
    fractions = [line["fraction_of_limit"] for line in rounds if "fraction_of_limit" in line]
    fraction = statistics.median(fractions) if fractions else None
    return Cell(statistics.median(values), min(values), max(values), rounds[0]["unit"], len(rounds), fraction)


def ratio(row: dict[str, Cell | str], quantised: bool) -> str:
    """How many times as fast as the best other engine modeltorch is, with the range that both spreads allow.

    Args:
        row: the cells of a workload.
        quantised: whether engines with weights of fewer bits than modeltorch's count.
    """
    mine = next((cell for label, cell in row.items() if label.split()[0] == MINE), "")
    others = {
        label: cell
        for label, cell in row.items()
        if isinstance(cell, Cell) and label.split()[0] != MINE and (quantised or label.split()[1] not in QUANTISED)
    }
    if not isinstance(mine, Cell) or not others:
        return "-"
    label = min(others, key=lambda label: others[label].value)
    best = others[label]
    spread = f"({best.least / mine.most:.2f} to {best.most / mine.least:.2f})"
    return f"{best.value / mine.value:.2f} {spread} {label}"


def taken_on(lines: Sequence[dict[str, Any]], model: str) -> str:
    """What a model's measurements were taken with: processor and threads, the versions of each engine."""
    hardware: list[str] = []
    versions: dict[str, list[str]] = {}
    for line in lines:
        if line["model"] == model and "error" not in line:
            if line["engine"] == MINE:
                hardware.append(line["hardware"])
            version = line.get("version") or f"{line['commit']} (torch {line['torch']})"
            versions.setdefault(line["engine"], []).append(version)
    engines = [f"{name} {', '.join(dict.fromkeys(of_engine))}" for name, of_engine in versions.items()]
    return "; ".join([*dict.fromkeys(hardware), *engines])


def rows(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The table as Markdown, one for each model, the reasons for the cells that are missing, and `taken_on`."""
    table = cells(lines)
    for model in dict.fromkeys(model for model, _ in table):
        mine = {workload: row for (name, workload), row in table.items() if name == model}
        labels = list(dict.fromkeys(label for row in mine.values() for label in row))
        heads = ["workload", "unit", *labels, "of the limit", "ratio, 16 bits and more", "ratio, any precision"]
        yield f"{model}: median of the rounds (least to most; rounds)\n"
        yield f"| {' | '.join(heads)} |"
        yield "|" + "---|" * len(heads)
        reasons: list[str] = []
        for workload, row in mine.items():
            yield f"| {' | '.join(_row(workload, row, labels, reasons))} |"
        notes = [f"[{number}] {reason}" for number, reason in enumerate(reasons, 1)]
        yield from ("", *notes, taken_on(lines, model), "")


def _row(workload: str, row: dict[str, Cell | str], labels: Sequence[str], reasons: list[str]) -> list[str]:
    shown = []
    for label in labels:
        cell = row.get(label, "not measured")
        if isinstance(cell, str):
            reason = f"{label}: {cell}"
            if reason not in reasons:
                reasons.append(reason)
            shown.append(f"not run [{reasons.index(reason) + 1}]")
        else:
            shown.append(str(cell))
    found = [cell for cell in row.values() if isinstance(cell, Cell)]
    unit = found[0].unit if found else "-"
    fractions = [cell.fraction_of_limit for cell in found if cell.fraction_of_limit is not None]
    limit = f"{fractions[0]:.1%}" if fractions else "-"
    return [workload, unit, *shown, limit, ratio(row, False), ratio(row, True)]
