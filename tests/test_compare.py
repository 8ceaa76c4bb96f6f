"""benchmarks/compare.py: what it says of two files of measurements, and of files that are none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMPARE = Path(__file__).parent.parent / "benchmarks" / "compare.py"
TIME = {
    "model": "it",
    "device": "cpu",
    "hardware": "a machine",
    "dtype": "float32",
    "workload": "decode_b1_ctx128",
    "value": 10.0,
    "unit": "ms",
    "min": 9.0,
    "max": 11.0,
}
SPEED = TIME | {"unit": "tok/s"}


def written(path: Path, *lines: dict | str) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def compared(old: Path, new: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(COMPARE), str(old), str(new)], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("value", "least", "most", "verdict"),
    [
        (5.0, 4.5, 5.5, "0.500 (0.409 to 0.611) faster"),
        (20.0, 18.0, 22.0, "2.000 (1.636 to 2.444) slower"),
        (10.5, 9.0, 12.0, "1.050 (0.818 to 1.333) no difference"),
    ],
)
def test_the_ratio_and_what_the_spreads_allow_are_told(tmp_path, value, least, most, verdict):
    old = written(tmp_path / "old", SPEED, TIME)
    new = written(tmp_path / "new", SPEED, TIME | {"value": value, "min": least, "max": most})
    run = compared(old, new)
    assert run.returncode == 0
    (line,) = run.stdout.splitlines()
    assert "it cpu float32 decode_b1_ctx128" in line
    assert line.endswith(verdict)


NONE = {
    "a line without min": ({key: value for key, value in TIME.items() if key != "min"}, ["min", "None"]),
    "a min of 0": (TIME | {"min": 0}, ["min", "0"]),
    "a max that is text": (TIME | {"max": "11"}, ["max", "'11'"]),
    "a value that is true": (TIME | {"value": True, "min": 1, "max": 1}, ["value", "True"]),
    "a value that is no number": (TIME | {"value": float("nan")}, ["value", "nan"]),
    "a max beyond any number": (TIME | {"max": float("inf")}, ["max", "inf"]),
    "a min above the value": (TIME | {"min": 10.5}, ["min", "10.5"]),
    "a workload that is a number": (TIME | {"workload": 5}, ["workload", "5"]),
    "a list": ("[1]", ["[1]"]),
    "a line cut off": (json.dumps(TIME)[:40], []),
    "an empty line": ("", []),
}


@pytest.mark.parametrize("side", ["old", "new"])
@pytest.mark.parametrize(("line", "words"), NONE.values(), ids=NONE)
def test_a_line_that_is_no_measurement_is_told_by_its_file_and_number(tmp_path, side, line, words):
    files = {name: written(tmp_path / name, TIME, *([line] if name == side else [])) for name in ("old", "new")}
    run = compared(**files)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith(f"compare: {files[side]}:2 ")
    assert run.stderr.count("\n") == 1
    assert all(word in run.stderr for word in words)


@pytest.mark.parametrize("lines", [(), (SPEED,)], ids=["an empty file", "no times"])
def test_a_file_without_a_time_is_told(tmp_path, lines):
    old, new = written(tmp_path / "old", TIME), written(tmp_path / "new", *lines)
    run = compared(old, new)
    assert run.returncode == 2
    assert run.stderr == f"compare: {new} holds no measurement of time\n"


def test_a_file_that_is_not_there_or_no_text_is_told(tmp_path):
    old, binary = written(tmp_path / "old", TIME), tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\n")
    for path in (tmp_path / "nowhere", binary):
        run = compared(old, path)
        assert run.returncode == 2
        assert run.stderr.startswith("compare: ")
        assert str(path) in run.stderr
        assert run.stderr.count("\n") == 1
