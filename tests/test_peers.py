"""benchmarks/peers: the ratios and the table, the lines that every engine writes, and that all see one workload."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

PEERS = Path(__file__).parent.parent / "benchmarks" / "peers"
sys.path.insert(0, str(PEERS))

import engines  # noqa: E402
import harness  # noqa: E402
import table  # noqa: E402

from modeltorch import bench  # noqa: E402
from modeltorch.subject import Subject  # noqa: E402


def line(engine, dtype, value, workload="decode_b1_ctx128", unit="ms", model="tiny", **more):
    return {
        "model": model,
        "engine": engine,
        "dtype": dtype,
        "workload": workload,
        "unit": unit,
        "value": value,
        "round": 0,
        "version": "1.0",
        **more,
    }


MINE = {"hardware": "a processor, 2 threads, avx2", "commit": "abc", "torch": "2.13.0", "version": None}

LINES = [
    *(line("modeltorch", "bfloat16", value, fraction_of_limit=8 / value, **MINE) for value in (10.0, 12.0, 11.0)),
    *(line("modeltorch", "bfloat16", 1000 / value, unit="tok/s", **MINE) for value in (10.0, 12.0, 11.0)),
    *(line("slow", "bfloat16", value) for value in (40.0, 44.0, 42.0)),
    *(line("wide", "fp32", value) for value in (33.0, 21.0, 22.0)),
    *(line("small", "int4", value) for value in (5.0, 5.5, 6.0)),
    line("broken", "bfloat16", 1.0),
    {"model": "tiny", "engine": "broken", "dtype": "bfloat16", "workload": "decode_b1_ctx128", "error": "no memory"},
    line("modeltorch", "bfloat16", 4.0, "serve_r32", "s", **MINE),
    line("slow", "bfloat16", 8.0, "serve_r32", "s"),
]


def test_a_cell_is_the_median_of_the_rounds_with_their_range():
    row = table.cells(LINES)["tiny", "decode_b1_ctx128"]
    assert row["modeltorch bfloat16"] == table.Cell(11.0, 10.0, 12.0, "ms", 3, 8 / 11.0)
    assert str(table.Cell(12345.6, 1000.2, 0.12345, "ms", 3)) == "12346 (1000 to 0.1235; 3)"
    assert row["wide fp32"] == table.Cell(22.0, 21.0, 33.0, "ms", 3)


def test_an_engine_that_failed_in_a_round_has_a_reason_and_does_not_count():
    row = table.cells(LINES)["tiny", "decode_b1_ctx128"]
    assert row["broken bfloat16"] == "no memory"
    assert "broken" not in table.ratio(row, quantised=True)


def test_the_ratio_is_over_the_best_engine_of_at_least_as_many_bits():
    row = table.cells(LINES)["tiny", "decode_b1_ctx128"]
    assert table.ratio(row, quantised=False) == "2.00 (1.75 to 3.30) wide fp32"
    assert table.ratio(row, quantised=True) == "0.50 (0.42 to 0.60) small int4"


def test_there_is_no_ratio_without_both_sides():
    assert table.ratio(table.cells(LINES[:3])["tiny", "decode_b1_ctx128"], True) == "-"
    assert table.ratio(table.cells([line("slow", "fp32", 1.0)])["tiny", "decode_b1_ctx128"], True) == "-"
    failed = {"model": "tiny", "engine": "modeltorch", "dtype": "bfloat16", "workload": "w", "error": "no"}
    assert table.ratio(table.cells([failed, line("slow", "fp32", 1.0, "w")])["tiny", "w"], True) == "-"


def test_the_table_shows_every_workload_and_the_reasons():
    shown = list(table.rows([*LINES, line("slow", "bfloat16", 1.0, model="other")]))
    heads, decode, serve = (text for text in shown[:5] if text.count("|") > 2 and "---" not in text)
    columns = [part.strip() for part in heads.split("|")]
    cells = dict(zip(columns, (part.strip() for part in decode.split("|")), strict=True))
    assert cells["workload"] == "decode_b1_ctx128" and cells["unit"] == "ms"
    assert cells["modeltorch bfloat16"] == "11 (10 to 12; 3)"
    assert cells["broken bfloat16"] == "not run [1]" and "[1] broken bfloat16: no memory" in shown
    assert cells["of the limit"] == "72.7%"
    assert cells["ratio, 16 bits and more"].startswith("2.00")
    cells = dict(zip(columns, (part.strip() for part in serve.split("|")), strict=True))
    assert cells["unit"] == "s" and cells["wide fp32"] == "not run [2]" and "[2] wide fp32: not measured" in shown
    assert cells["ratio, any precision"] == "2.00 (2.00 to 2.00) slow bfloat16"
    assert any(text.startswith("other:") for text in shown)


def test_under_the_table_stands_what_it_was_taken_with():
    lines = [
        line("modeltorch", "bfloat16", 4.0, **MINE),
        *(line("slow", "bfloat16", 8.0, version=version) for version in ("1.0", "1.1", "1.0")),
        {"model": "tiny", "engine": "broken", "dtype": "int8", "workload": "w", "error": "no", "round": 0},
        line("slow", "bfloat16", 1.0, model="other", version="2.0"),
    ]
    assert table.taken_on(lines, "tiny") == "a processor, 2 threads, avx2; modeltorch abc (torch 2.13.0); slow 1.0, 1.1"
    assert table.taken_on(lines, "tiny") in list(table.rows(lines))


def test_the_table_of_an_earlier_run(tmp_path):
    file = tmp_path / "earlier.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in LINES))
    run = [sys.executable, str(PEERS / "run.py"), "--table", str(file)]
    printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert printed == "\n".join(table.rows(LINES)) + "\n"


class Stub(harness.Peer):
    """An engine that notes what it is asked for."""

    version = "1"

    def __init__(self):
        self.asked: list[tuple] = []

    @classmethod
    def convert(cls, checkpoint, converted, dtype):
        raise NotImplementedError

    def prefill(self, prompt, runs):
        self.asked.append((prompt, runs))
        return [0.5, 0.25, 1.0]

    def decode(self, prompts, warm_up, steps):
        if len(prompts) > 8:
            raise MemoryError("too\nmany")
        self.asked.append((prompts, warm_up, steps))
        return [0.1] * (steps - 1) + [0.2]

    def serve(self, prompts, new_tokens):
        self.asked.append((prompts, new_tokens))
        return 2.0


def test_lines_of_an_engine():
    stub = Stub()
    names = ["prefill_b1_s128", "decode_b8_ctx128", "decode_b9_ctx128", "serve_r4"]
    lines = list(harness.measure(stub, names, 100, runs=3, steps=32))
    assert lines[0] == {"workload": names[0], "unit": "ms", "value": 500.0, "min": 250.0, "max": 1000.0, "runs": 3}
    assert lines[1] == {"workload": names[0], "unit": "tok/s", "value": 256.0, "min": 128.0, "max": 512.0, "runs": 3}
    assert [(entry["unit"], entry["value"]) for entry in lines[2:4]] == [("ms", 100.0), ("tok/s", 80.0)]
    assert lines[4] == {"workload": names[2], "error": "MemoryError: too many"}
    assert lines[5] == {"workload": names[3], "unit": "s", "value": 2.0, "min": 2.0, "max": 2.0, "runs": 1}
    prompts, warm_up, steps = stub.asked[1]
    contexts = [len(prompts[0]) + warm_up + step for step in range(1, steps + 1)]
    assert len(prompts) == 8 and sum(contexts) / len(contexts) == pytest.approx(128, abs=0.5)
    assert stub.asked[-1][1] == harness.REQUEST_NEW_TOKENS


def test_the_engines_get_the_requests_of_modeltorch_bench():
    class Model:
        vocab_size = 1000
        device = bench.torch.device("cpu")

        def generate(self, prompts, **_):
            self.prompts = prompts

    model = Model()
    list(bench.serve(Subject("stub", model), 32, harness.REQUEST_PROMPT, harness.REQUEST_NEW_TOKENS))
    assert harness.prompts(1000, harness.request_lengths(32)) == model.prompts
    assert all(64 <= len(prompt) <= 256 for prompt in model.prompts)
    list(bench.serve(Subject("stub", model), 256, bench.REQUEST_PROMPT, bench.REQUEST_NEW_TOKENS))
    assert sum(len(prompt) for prompt in model.prompts) == 74_643  # as many as those that vLLM was measured with


@pytest.mark.parametrize("name", ["prefill_s128", "decode_b1", "serve", "serve_r32x", ""])
def test_an_unknown_workload_is_refused(name):
    with pytest.raises(ValueError, match="no workload is called"):
        harness.Workload.parse(name)


def test_the_default_workloads_are_known():
    parsed = [harness.Workload.parse(name) for name in harness.WORKLOADS.split(",")]
    assert {workload.kind for workload in parsed} == {"prefill", "decode", "serve"}
    assert all(a.name != b.name for a, b in itertools.combinations(parsed, 2))


@pytest.fixture
def ran(monkeypatch):
    """The commands of engines.set_up, which are not run; an entry of `failing` fails."""
    commands, failing = [], set()

    def run(*command):
        words = [str(part) for part in command]
        commands.append(words)
        if failing & set(words):
            raise RuntimeError("no network")
        if "venv" in words:
            Path(words[-1]).mkdir(parents=True, exist_ok=True)
            for stamp in Path(words[-1]).iterdir():
                stamp.unlink()

    monkeypatch.setattr(engines, "_run", run)
    return commands, failing


def test_an_environment_is_kept_when_complete_and_finished_when_not(ran, tmp_path):
    commands, failing = ran
    wanted = engines.Environment("some", ("first==1", "second==2"), unwanted=("third",))
    failing.add("uninstall")
    with pytest.raises(RuntimeError, match="no network"):
        engines.set_up(wanted, tmp_path, 1)
    failing.clear()
    commands.clear()
    python = engines.set_up(wanted, tmp_path, 1)
    assert not any("venv" in command for command in commands)
    assert [command[3] for command in commands] == ["install", "uninstall"]
    commands.clear()
    assert engines.set_up(wanted, tmp_path, 1) == python and commands == []
    engines.set_up(dataclasses.replace(wanted, requirements=("first==2",)), tmp_path, 1)
    assert "venv" in commands[0] and "--clear" in commands[0]


def test_an_environment_that_needs_a_missing_program_says_so(ran, tmp_path):
    with pytest.raises(RuntimeError, match="some needs no-such-program, which this machine lacks"):
        engines.set_up(engines.Environment("some", (), commands=("sh", "no-such-program")), tmp_path, 1)
    assert ran[0] == []


def test_setting_up_says_how_far_a_build_is_and_why_it_failed(capsys):
    build = 'for part in 4 9 12 18 50; do echo "[ $part%] Building"; done; echo no compiler >&2; exit 3'
    with pytest.raises(RuntimeError, match="sh -c failed: no compiler"):
        engines._run("sh", "-c", build)
    shown = capsys.readouterr().err.splitlines()
    assert shown[-2:] == ["  10 %", "  50 %"] and shown[0].startswith("+ sh -c")
