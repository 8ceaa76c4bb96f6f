"""`modeltorch bench`: which workloads it measures, what it writes down, and that the figures agree."""

from __future__ import annotations

import importlib
import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import Shape, random_model

from modeltorch import bench, cli, limits, shapes
from modeltorch import subject as subject_module
from modeltorch.checkpoint import BUNDLED
from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM
from modeltorch.subject import Subject

KEYS = {
    "model": str,
    "device": str,
    "hardware": str,
    "dtype": str,
    "workload": str,
    "value": float,
    "unit": str,
    "min": float,
    "max": float,
    "runs": int,
    "commit": str,
    "torch": str,
}
LIMIT_KEYS = {"limit": float, "limit_unit": str, "fraction_of_limit": float}
SHORT = ["--prompt-len", "8", "--prefill-batch", "1", "--context", "80", "--decode-batch", "1", "--requests", "0"]
QUICK = [*SHORT, "--runs", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A checkpoint of a random model with room for the requests that bench serves."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    random_model(Shape(layers=1, max_positions=2048)).save_pretrained(folder)
    return folder


def measured(file: Path) -> dict[tuple[str, str], dict]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({(line["workload"], line["unit"]) for line in lines}) == len(lines)
    return {(line["workload"], line["unit"]): line for line in lines}


@pytest.fixture(scope="module")
def report(tiny, tmp_path_factory) -> tuple[dict[tuple[str, str], dict], list[str]]:
    """What one run wrote, and the table that it printed."""
    file = tmp_path_factory.mktemp("report") / "bench.json"
    arguments = ["bench", "--model", str(tiny), "--dtype", "float32", "--json", str(file), "--threads", "1"]
    lists = ["--prompt-len", "16,128", "--prefill-batch", "1,3", "--context", "80,300", "--decode-batch", "1,2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeltorch.limits.last_level_cache", lambda: 1)  # a model this small lies in any real one
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert cli.main([*arguments, *lists, "--requests", "5", "--runs", "3"]) == 0
    return measured(file), printed


PREFILLS = {f"prefill_b{batch}_s{length}": batch * length for batch in (1, 3) for length in (16, 128)}
DECODES = {f"decode_b{batch}_ctx{context}": batch for batch in (1, 2) for context in (80, 300)}


def test_every_workload_is_measured_in_its_units(report):
    found, _ = report
    both = {(workload, unit) for workload in PREFILLS | DECODES for unit in ("ms", "tok/s")}
    assert set(found) == both | {("serve_r5", "s")}


def test_each_line_has_the_agreed_keys(report):
    found, _ = report
    for line in found.values():
        limits = {} if line["unit"] == "s" else LIMIT_KEYS
        assert {key: type(value) for key, value in line.items()} == KEYS | limits
        assert all(line[key] > 0 for key in limits if key != "limit_unit")
        assert all(line[key] for key, kind in KEYS.items() if kind is str)
        said = {key: line[key] for key in ("model", "device", "dtype", "torch")}
        assert said == {"model": "tiny", "device": "cpu", "dtype": "float32", "torch": torch.__version__}
        assert 0 < line["min"] <= line["value"] <= line["max"]


def test_the_number_of_runs_is_that_of_the_samples(report):
    found, _ = report
    for (workload, _), line in found.items():
        assert line["runs"] == (3 if workload in PREFILLS else bench.DECODE_STEPS if workload in DECODES else 1)


def test_tokens_a_second_are_the_tokens_over_the_time(report):
    found, _ = report
    for workload, tokens in (PREFILLS | DECODES).items():
        time, speed = found[workload, "ms"], found[workload, "tok/s"]
        for one, other in (("value", "value"), ("min", "max"), ("max", "min")):
            assert speed[one] == pytest.approx(1000 * tokens / time[other])


def test_the_table_has_a_line_for_each_measurement(report):
    found, printed = report
    assert len(printed) == len(found)
    for (workload, unit), row in zip(found, printed, strict=True):
        assert workload in row.split()
        assert unit in row.split()
        assert f"{found[workload, unit]['value']:.5g}" in row.split()


def test_measurements_are_added_to_a_file_that_exists(tiny, tmp_path, capsys):
    file = tmp_path / "bench.json"
    file.write_text("kept\n")
    assert cli.main(["bench", "--model", str(tiny), *QUICK, "--json", str(file)]) == 0
    first, *others = file.read_text().splitlines()
    assert first == "kept"
    assert len(others) == len(capsys.readouterr().out.splitlines()) == 4


def test_a_shape_gives_random_weights_and_its_own_name(tmp_path, monkeypatch):
    small = shapes.Qwen2Shape(100, 32, 48, 2, 4, 2, True)
    monkeypatch.setitem(shapes.SHAPES, "qwen2.5-tiny", small)
    file = tmp_path / "bench.json"
    assert cli.main(["bench", "--shape", "qwen2.5-tiny", *QUICK, "--json", str(file)]) == 0
    assert {(line["model"], line["dtype"]) for line in measured(file).values()} == {("qwen2.5-tiny", "bfloat16")}


PARAMETERS = {"qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-7b": 7_615_616_512}


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items(), ids=PARAMETERS)
def test_the_shapes_have_the_parameters_of_the_published_models(name, parameters):
    weights = shapes.SHAPES[name].random_weights(torch.bfloat16, "meta")
    assert sum(weight.numel() for weight in weights.values()) == parameters
    assert set(shapes.SHAPES) == set(PARAMETERS)


# ---- the usual sizes ---------------------------------------------------------------------------------


@pytest.fixture
def named(monkeypatch) -> list[str]:
    """Names of the measurements that were begun; none is made."""
    begun: list[str] = []
    for kind, name in (("prefill", "prefill_b{}_s{}"), ("decode", "decode_b{}_ctx{}"), ("serve", "serve_r{}")):

        def measurement(subject, *sizes, name=name):
            begun.append(name.format(*sizes))
            yield from ()

        monkeypatch.setattr(bench, kind, measurement)
    return begun


def test_without_options_every_usual_size_is_measured(tiny, named, tmp_path, capsys):
    folder = tmp_path / "long"
    random_model(Shape(layers=1, max_positions=4096)).save_pretrained(folder)
    capsys.readouterr()
    assert cli.main(["bench", "--model", str(folder)]) == 0
    prefills = [f"prefill_b{batch}_s{length}" for batch in (1, 8) for length in (128, 512)]
    decodes = [f"decode_b{batch}_ctx{context}" for batch in (1, 8) for context in (128, 2048)]
    assert named == [*prefills, *decodes, "serve_r256"]
    assert capsys.readouterr().err == ""


def test_usual_sizes_that_the_bundled_model_has_no_room_for_are_left_out_and_named(named, capsys):
    assert cli.main(["bench", "--model", str(BUNDLED)]) == 0
    assert named == ["prefill_b1_s128", "prefill_b8_s128", "decode_b1_ctx128", "decode_b8_ctx128"]
    error = capsys.readouterr().err
    assert error.startswith("modeltorch: left out")
    assert error.count("\n") == 1
    assert "512 positions" in error
    left_out = ("prefill_b1_s512", "prefill_b8_s512", "decode_b1_ctx2048", "decode_b8_ctx2048", "serve_r256")
    assert all(name in error for name in left_out)


def test_an_empty_list_leaves_its_kind_out(named, tiny):
    assert cli.main(["bench", "--model", str(tiny), "--prompt-len", "", "--context", "80", "--requests", "0"]) == 0
    assert named == ["decode_b1_ctx80", "decode_b8_ctx80"]


# ---- what a step is measured against -----------------------------------------------------------------


def test_the_last_level_of_the_caches_is_added_up_over_those_that_are_not_the_same(tmp_path):
    caches = [
        (0, 1, "48K", "0"),
        (0, 3, "1024K", "0-1"),
        (1, 3, "1024K", "0-1"),
        (2, 3, "512K", "2"),
        (2, 2, "64K", "2"),
    ]
    for number, (cpu, level, size, shared) in enumerate(caches):
        folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{number}"
        folder.mkdir(parents=True)
        for name, content in (("level", level), ("size", size), ("shared_cpu_list", shared)):
            (folder / name).write_text(f"{content}\n")
    assert limits.last_level_cache(tmp_path) == (1024 + 512) * 1024
    assert limits.last_level_cache(tmp_path / "nothing") == 0


@pytest.mark.parametrize(("moved", "has_limit"), [(399, False), (400, True)])
def test_a_step_that_may_read_from_the_caches_has_no_read_limit(monkeypatch, moved, has_limit):
    monkeypatch.setattr(limits, "last_level_cache", lambda: 100)
    rate = limits.ReadRate(samples=[2.0, 8.0, 4.0])
    limit = rate.limit(moved, 1e-6)
    assert (limit is not None) == has_limit
    if limit is not None:
        assert (limit.rate, limit.unit, limit.fraction) == (4.0, "GB/s", pytest.approx(moved / 4000))


def test_sources_without_history_are_told_their_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(subject_module, "__file__", str(tmp_path / "subject.py"))
    for told, commit in ((None, "unknown"), ("abc1234", "abc1234")):
        monkeypatch.setenv("MODELTORCH_COMMIT", told) if told else monkeypatch.delenv("MODELTORCH_COMMIT", False)
        subject_module._commit.cache_clear()
        assert subject_module._commit() == commit
    subject_module._commit.cache_clear()


@pytest.mark.parametrize("kind", ["cuda", "npu"])
def test_an_accelerator_is_named_and_waited_for_before_and_after_what_is_timed(monkeypatch, kind):
    done: list[object] = []
    device = SimpleNamespace(type=kind)  # no torch.device: a torch without torch_npu knows no "npu"
    module = SimpleNamespace(synchronize=lambda of: done.append(of), get_device_name=lambda of: f"{of.type} 9000")
    monkeypatch.setattr(torch, kind, module, raising=False)
    monkeypatch.setattr(subject_module, "_driver", lambda: "1.2")
    assert subject_module.hardware(device) == ("cuda 9000, driver 1.2" if kind == "cuda" else "npu 9000")
    bench._seconds(device, lambda: done.append("body"))
    assert done == [device, "body", device]


def test_the_processor_asks_for_no_accelerator(monkeypatch):
    monkeypatch.delattr(torch, "npu", raising=False)
    monkeypatch.delattr(torch, "cuda")
    device = torch.device("cpu")
    assert f"{torch.get_num_threads()} threads" in subject_module.hardware(device)
    assert bench._seconds(device, lambda: None) >= 0


def test_operations_are_measured_against_the_same_read_rate_as_steps(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    bench_ops = importlib.import_module("bench_ops")
    rates = iter(range(1, 1 + bench_ops.READ_SAMPLES))
    monkeypatch.setattr(limits.ReadRate, "sample", lambda self: self.samples.append(float(next(rates))))
    assert bench_ops.read_rate() == statistics.median(range(1, 1 + bench_ops.READ_SAMPLES)) * 1e9


# ---- what is timed ----------------------------------------------------------------------------------


@pytest.fixture
def subject() -> Subject:
    reference = random_model(Shape(layers=1))
    sizes = {"dtype": "float32", "block_size": 16, "num_blocks": 100}
    return Subject("it", FlashQwen2ForCausalLM(reference.config, reference.state_dict(), **sizes))


@pytest.fixture
def contexts(subject, monkeypatch) -> list[tuple[bool, list[int]]]:
    """Phase and contexts of each step that the subject runs."""
    steps = []
    original = subject.model.forward

    def forward(*arguments, **keywords):
        steps.append((arguments[2], arguments[6].tolist()))
        return original(*arguments, **keywords)

    monkeypatch.setattr(subject.model, "forward", forward)
    return steps


def test_a_prefill_runs_whole_prompts_once_more_than_it_is_timed(subject, contexts):
    list(bench.prefill(subject, batch=3, length=20, runs=4))
    assert contexts == [(True, [20, 20, 20])] * 5
    assert subject.model.cache.free_blocks == 100


def test_the_context_of_a_decode_is_the_mean_over_its_timed_steps(subject, contexts):
    list(bench.decode(subject, batch=2, context=100))
    timed = contexts[-bench.DECODE_STEPS :]
    assert len(contexts) > len(timed) == 128
    assert all(not is_prefill and lengths[0] == lengths[1] for is_prefill, lengths in contexts)
    assert statistics.mean(lengths[0] for _, lengths in timed) == pytest.approx(100, abs=0.5)
    assert subject.model.cache.free_blocks == 100


def test_serving_runs_every_request_to_its_full_length(subject, contexts):
    list(bench.serve(subject, 6, prompt_range=(5, 40), new_tokens=9))
    served = contexts[2:]  # without the request of two steps that warms up
    prompts = [length for is_prefill, lengths in served if is_prefill for length in lengths]
    assert len(prompts) == 6
    assert min(prompts) >= 5
    assert max(prompts) <= 40
    assert sum(len(lengths) for is_prefill, lengths in served if not is_prefill) == 6 * 8
    assert subject.model.cache.free_blocks == 100


# ---- mistakes ---------------------------------------------------------------------------------------

MISTAKES = {
    "an unknown shape": (["--shape", "qwen9"], ["qwen9", *PARAMETERS]),
    "a context with no room for the timed steps": (["--context", "72"], ["--context", "73", "72"]),
    "a prompt beyond the positions": (["--prompt-len", "2049"], ["2049", "2048 positions"]),
    "a context beyond the positions": (["--context", "2048"], ["2048 positions"]),
    "a batch beyond the cache": (["--decode-batch", "300000"], ["cache", "300000"]),
    "a prompt longer than any number": (["--prompt-len", "9" * 20], ["9" * 20, "2048 positions"]),
    "a prefill batch longer than any number": (["--prefill-batch", "9" * 20], ["cache", "9" * 20]),
    "a context longer than any number": (["--context", "9" * 20], ["9" * 20, "2048 positions"]),
    "more requests than memory": (["--requests", "9" * 20], ["--requests", "9" * 20]),
    "requests longer than the positions": (["--requests", "1", "--request-prompt", "64,2000"], ["serve_r1", "2048"]),
    "requests of longer answers": (["--requests", "1", "--request-new-tokens", "9" * 20], ["serve_r1", "2048"]),
    "nothing": (["--prompt-len", "", "--context", ""], ["nothing to measure"]),
    "no runs": (["--runs", "0"], ["--runs", "0"]),
    "fewer runs than none": (["--runs", "-1"], ["--runs", "-1"]),
    "fewer requests than none": (["--requests", "-1"], ["--requests", "-1"]),
    "an unknown device": (["--device", "toaster"], ["device", "toaster"]),
    "a file in no folder": (["--json", "/no/such/folder/bench.json"], ["/no/such/folder"]),
    "a folder for a file": (["--json", "/"], ["'/'"]),
}


@pytest.mark.parametrize(("options", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_in_one_line_before_anything_is_measured(tiny, capsys, options, words):
    model = [] if "--shape" in options else ["--model", str(tiny)]
    assert cli.main(["bench", *model, *QUICK, *options]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("modeltorch: ")
    assert output.err.count("\n") == 1
    assert all(word in output.err for word in words)
    assert output.out == ""


@pytest.mark.parametrize(
    "options",
    [
        ["--prompt-len", "many"],
        ["--prompt-len", "0"],
        ["--context", "128,-1"],
        ["--decode-batch", "1;2"],
        ["--shape", "qwen2.5-7b", "--model", "it"],
    ],
    ids=" ".join,
)
def test_options_that_do_not_parse_end_with_status_2(capsys, options):
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", *options])
    assert caught.value.code == 2
    assert "usage: modeltorch bench" in capsys.readouterr().err
