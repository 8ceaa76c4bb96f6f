"""benchmarks/gpu_table.py: the table of a small file of results, and README's of the same form."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_table  # noqa: E402


def entry(workload: str, value: float, **changes) -> dict:
    return {
        "model": "qwen2.5-7b",
        "device": "cuda",
        "hardware": "NVIDIA H100 80GB HBM3, driver 1.2",
        "dtype": "bfloat16",
        "workload": workload,
        "value": value,
        "unit": "ms",
        "min": value * 0.98,
        "max": value * 1.02,
        "runs": 4,
        "commit": "abc1234",
        "torch": "2.11.0",
        **changes,
    }


RESULTS = [
    entry("decode_b1_ctx512", 9.0),
    entry("decode_b1_ctx512", 5.0, fraction_of_limit=0.876),  # measured again: the later counts
    entry("decode_b1_ctx512", 200.0, unit="tok/s"),
    entry("decode_b8_ctx512", 7.0, dtype="float16"),
    entry("decode_b32_ctx512", 7.0, device="cpu"),
    entry("prefill_b8_s1024", 170.55),
    entry("prefill_b1_s77", 1.0),
    entry("serve_r256", 0.5, model="qwen2.5-0.5b", unit="s", min=0.5, max=0.5, runs=1, commit="def5678"),
]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "card.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in RESULTS))
    return path


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_table.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def readme_table() -> list[str]:
    _, _, rest = (ROOT / "README.md").read_text().partition(gpu_table.BEGIN + "\n")
    made, end, _ = rest.partition(gpu_table.END)
    assert end
    return made.splitlines()


def test_the_table_holds_what_was_measured_beside_the_references(results):
    made = run(results)
    assert made.returncode == 0, made.stderr
    rows = {cells(line)[0]: cells(line)[1:] for line in made.stdout.splitlines() if line.startswith("|")}
    assert rows["7B decode, 1 x 512"] == ["5 (4.9 to 5.1)", "88%", "5.0", "6.28", "4.49"]
    assert rows["7B prefill, 8 x 1024"] == ["170.6 (167.1 to 174.0)", "", "173", "182", "152"]
    assert rows["0.5B, 256 requests, in s"] == ["0.5", "", "0.55", "0.90", "0.16"]
    assert {row[0] for name, row in rows.items() if name.startswith(("7B decode, 8", "7B decode, 32"))} == {
        "not measured"
    }
    assert len(rows) == 2 + 18
    assert made.stdout.splitlines()[-1] == (
        "Measured on NVIDIA H100 80GB HBM3, driver 1.2, torch 2.11.0, at commit abc1234 and def5678."
    )


def test_the_table_of_readme_has_the_same_form(results):
    made, shown = run(results).stdout.splitlines(), readme_table()
    for mine, readme in zip(made[:20], shown[:20], strict=True):
        assert cells(mine)[:1] + cells(mine)[3:] == cells(readme)[:1] + cells(readme)[3:]
        number = r"[\d.]+"
        pattern = rf"modeltorch|---|not measured|{number}( \({number} to {number}\))?"
        assert re.fullmatch(pattern, cells(readme)[1])
        assert re.fullmatch(r"of the limit|---|\d+%|", cells(readme)[2])
    assert shown[20] == ""
    assert re.fullmatch(r"Measured on NVIDIA .*, driver [\d.]+, torch \S+, at commit .*\.", shown[21])


def test_the_table_of_readme_is_that_of_the_results():
    files = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
    if not files:
        pytest.skip("no results are kept yet")
    assert readme_table() in [gpu_table.table([file]).splitlines() for file in files]


def test_a_page_keeps_everything_around_its_table(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{gpu_table.BEGIN}\nold\n{gpu_table.END}\nafter\n")
    assert run(results, "--into", page).returncode == 0
    made = run(results).stdout
    assert page.read_text() == f"before\n{gpu_table.BEGIN}\n{made}{gpu_table.END}\nafter\n"


@pytest.mark.parametrize(
    ("text", "page", "words"),
    [
        ("{}", "", "no measurement"),
        (json.dumps(entry("decode_b1_ctx1", 1.0)), "", "no workload of the table"),
        (json.dumps(entry("decode_b1_ctx512", 1.0)), "no place", "has no lines"),
    ],
)
def test_what_makes_no_table_is_told_in_one_line(tmp_path, text, page, words):
    results, into = tmp_path / "it.jsonl", tmp_path / "page.md"
    results.write_text(text + "\n")
    into.write_text(page)
    refused = run(results, "--into", into)
    assert refused.returncode == 2
    assert words in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert into.read_text() == page
