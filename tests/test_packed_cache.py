"""Packed weights in files next to a checkpoint: when they are used, when not, and what never breaks a model."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from reference import Shape, random_model

from modeltorch import cli, weight_list
from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM

SHAPE = Shape(tied=True, vocab=152)
SEQUENCES = [[5, 9, 2, 77, 31, 8, 150, 0], [3], list(range(60, 100))]
FOLDER = ".modeltorch"
packs = pytest.mark.skipif(torch.ops.ModelTorch.cpu_level() == "generic", reason="this processor level packs nothing")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    """A bfloat16 checkpoint of a random model."""
    random_model(SHAPE).to(torch.bfloat16).save_pretrained(tmp_path / "it")
    return tmp_path / "it"


def opened(folder: Path, cache_packed: bool = True, dtype: str = "bfloat16") -> FlashQwen2ForCausalLM:
    return FlashQwen2ForCausalLM.from_pretrained(
        folder, dtype=dtype, block_size=16, num_blocks=40, cache_packed=cache_packed
    )


def counts(model: FlashQwen2ForCausalLM) -> tuple[int, int]:
    """Files that loading the model read and wrote."""
    counters = model.acl_encoder_operation.counters()
    assert model.acl_decoder_operation.counters()["packed_files_read"] == 0, "the second object shares"
    return counters["packed_files_read"], counters["packed_files_written"]


def logits(model: FlashQwen2ForCausalLM) -> torch.Tensor:
    return torch.cat(model.compute_logits(SEQUENCES))


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Name, inode and time of every kept file."""
    found = {}
    for path in (folder / FOLDER).iterdir():
        status = path.stat()
        found[path.name] = (status.st_ino, status.st_mtime_ns)
    return found


def test_nothing_is_kept_unless_asked_for(folder):
    assert counts(opened(folder, cache_packed=False)) == (0, 0)
    assert not (folder / FOLDER).exists()


@packs
def test_a_second_load_takes_the_files_and_gives_the_same_bits(folder):
    expected = logits(opened(folder, cache_packed=False))
    first = opened(folder)
    kept = files(folder)
    assert counts(first) == (0, len(kept))
    assert len(kept) == 4 * SHAPE.layers + 1  # qkv, o, gate_up and down of each layer, and the tied head
    assert torch.equal(logits(first), expected)
    beside = opened(folder)
    assert counts(beside) == (0, 0)  # what another object of the process holds is shared
    assert torch.equal(logits(beside), expected)
    del first, beside
    second = opened(folder)
    assert counts(second) == (len(kept), 0)
    assert files(folder) == kept
    assert torch.equal(logits(second), expected)


def test_types_that_are_not_packed_leave_no_folder(folder):
    assert counts(opened(folder, dtype="float32")) == (0, 0)
    assert not (folder / FOLDER).exists()


@packs
@pytest.mark.parametrize("how", ["header", "payload", "last byte", "cut", "empty", "magic", "folder", "exchanged"])
def test_a_damaged_file_is_packed_and_written_again(folder, how):
    expected = logits(opened(folder))
    paths = sorted((folder / FOLDER).iterdir(), key=lambda path: (path.stat().st_size, path.name))
    path = paths[-1]
    content = bytearray(path.read_bytes())
    before = bytes(content)
    if how in ("header", "payload", "last byte", "magic"):
        content[{"header": 20, "payload": 5000, "last byte": -1, "magic": 0}[how]] ^= 0x40
        path.write_bytes(content)
    elif how in ("cut", "empty"):
        path.write_bytes(content[: -4096 if how == "cut" else 0])
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:  # a whole and sound file of the same size under another's name
        path, other = next(
            (one, next_one)
            for one, next_one in itertools.pairwise(paths)
            if one.stat().st_size == next_one.stat().st_size
        )
        before = path.read_bytes()
        path.write_bytes(other.read_bytes())
    repaired = opened(folder)
    assert counts(repaired) == (len(paths) - 1, 1)
    assert path.read_bytes() == before
    assert torch.equal(logits(repaired), expected)
    del repaired
    assert counts(opened(folder)) == (len(paths), 0)


@packs
def test_changed_weights_do_not_hit(folder):
    expected = logits(opened(folder))
    kept = files(folder)
    model = random_model(SHAPE).to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] += 1.0
    model.save_pretrained(folder)
    changed = opened(folder)
    assert counts(changed) == (len(kept) - 1, 1)
    assert files(folder).items() > kept.items()
    assert not torch.equal(logits(changed), expected)
    assert torch.equal(logits(changed), logits(opened(folder, cache_packed=False)))


LOAD = """
import json, sys, torch
from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM
model = FlashQwen2ForCausalLM.from_pretrained(sys.argv[1], block_size=16, num_blocks=40, cache_packed=True)
counters = model.acl_encoder_operation.counters()
answer = model.generate([[5, 9, 2, 77]], max_new_tokens=8, ignore_eos=True)[0].token_ids
print(json.dumps([counters["packed_files_read"], counters["packed_files_written"], answer]))
"""


def started(folder: Path, script: str = LOAD, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, int, list[int]]:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    read, written, answer = json.loads(output)
    return read, written, answer


@packs
def test_two_processes_at_once_both_run_and_leave_whole_files(folder):
    results = [finished(process) for process in [started(folder), started(folder)]]
    model = opened(folder)
    read, written = counts(model)
    assert (written, len(files(folder))) == (0, read)
    (answer,) = model.generate([[5, 9, 2, 77]], max_new_tokens=8, ignore_eos=True)
    for one_read, one_written, tokens in results:
        assert one_read + one_written == read
        assert tokens == answer.token_ids


@packs
def test_levels_share_files_if_and_only_if_they_share_the_layout(folder):
    read, written, _ = finished(started(folder, MODELTORCH_CPU_LEVEL="generic"))
    assert (read, written) == (0, 0), "this level packs nothing"
    assert not (folder / FOLDER).exists()
    _, written, _ = finished(started(folder, MODELTORCH_CPU_LEVEL="avx2"))
    assert written > 0
    assert finished(started(folder, MODELTORCH_CPU_LEVEL="generic"))[:2] == (0, 0)
    assert finished(started(folder))[:2] == (written, 0)


@packs
def test_a_folder_that_cannot_be_made_costs_one_warning(folder):
    expected = logits(opened(folder, cache_packed=False))
    (folder / FOLDER).write_text("a file of that name")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = opened(folder)
    about = [str(one.message) for one in caught if "packed weights" in str(one.message)]
    assert len(about) == 1
    assert str(folder / FOLDER) in about[0]
    assert counts(model) == (0, 0)
    assert torch.equal(logits(model), expected)


@packs
def test_files_in_a_folder_that_cannot_be_written_are_read_in_silence(folder):
    opened(folder)
    (folder / FOLDER).chmod(0o555)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read, written = counts(opened(folder))
    finally:
        (folder / FOLDER).chmod(0o755)
    assert read > 0
    assert written == 0


@packs
def test_a_full_disk_costs_one_warning_and_leaves_nothing_behind(folder):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
    process = started(folder, limit + LOAD)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert errors.count("packed weights cannot be kept") == 1
    left = list((folder / FOLDER).iterdir())
    assert all(path.suffix == ".packed" for path in left)
    assert counts(opened(folder))[0] == len(left)


@packs
def test_old_temporaries_go_and_young_ones_stay(folder):
    kept = folder / FOLDER
    kept.mkdir()
    old, young = kept / "0.packed.tmp.1", kept / "0.packed.tmp.2"
    for path in (old, young):
        path.write_text("part of a file")
    long_ago = time.time() - 7200
    os.utime(old, (long_ago, long_ago))
    opened(folder)
    assert not old.exists()
    assert young.exists()


@pytest.mark.parametrize("value", [3, None, True, ["/tmp"], "a\0b"], ids=str)
def test_the_key_must_be_a_path(folder, value):
    made = torch.classes.ModelTorch.ModelTorch("qwen_PAModel")
    config = opened(folder, cache_packed=False)
    parameters = {
        "isPrefill": True,
        "isBF16": True,
        "isFA": False,
        "rmsNormEps": 1e-6,
        "numHiddenLayers": 1,
        "numAttentionHeadsPerRank": config.num_heads,
        "numKeyValueHeadsPerRank": config.num_kv_heads,
        "hiddenSizePerAttentionHead": config.head_size,
    }
    made.set_param(json.dumps(parameters | {"packedWeightFolder": ""}))
    with pytest.raises(ValueError, match="packedWeightFolder"):
        made.set_param(json.dumps(parameters | {"packedWeightFolder": value}))


# ---- on the command line, and what a person sees meanwhile ---------------------------------------


def test_the_command_line_keeps_packed_weights_too(folder, capsys):
    command = ["generate", "--model", str(folder), "--cache-packed", "--max-new-tokens", "2", "--prompt", "1"]
    cli.main(command)
    assert cli.main(["bench", "--cache-packed"]) == 2
    assert "--cache-packed needs --model" in capsys.readouterr().err
    packed = torch.ops.ModelTorch.cpu_level() != "generic"
    assert (folder / FOLDER).exists() == packed


class Bar:
    """Stands for tqdm's bar on a terminal."""

    made: list[Bar] = []  # noqa: RUF012

    def __init__(self, items: object = None, *, total: int = 0, desc: str = "", **options: object) -> None:
        self.items, self.total, self.desc, self.n, self.disable, self.closed = items, total, desc, 0, False, False
        self.seen: list[int] = []
        assert options["disable"] is None
        Bar.made.append(self)

    def __iter__(self) -> object:
        return iter(self.items)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def update(self, more: int) -> None:
        self.n += more
        self.seen.append(self.n)


def test_packing_shows_in_a_bar_of_its_own(monkeypatch):
    monkeypatch.setattr("tqdm.tqdm", Bar)
    monkeypatch.setattr(weight_list, "_POLL_SECONDS", 0.001)
    Bar.made = []
    parts = iter([0.0, 0.25, 0.5, 1.0])
    last = 0.0

    def progress() -> float:
        nonlocal last
        last = next(parts, last)
        return last

    with weight_list.packing_shown(progress):
        deadline = time.monotonic() + 30
        while Bar.made[0].n < 100 and time.monotonic() < deadline:
            time.sleep(0.001)
    (bar,) = Bar.made
    assert (bar.desc, bar.total, bar.closed) == ("packing", 100, True)
    assert list(dict.fromkeys(bar.seen)) == [0, 25, 50, 100]


def test_loading_shows_weights_then_packing(folder, monkeypatch):
    monkeypatch.setattr("tqdm.tqdm", Bar)
    Bar.made = []
    opened(folder, cache_packed=False)
    assert [bar.desc for bar in Bar.made if bar.desc in ("weights", "packing")] == ["weights", "packing"]
    assert Bar.made[-1].closed
