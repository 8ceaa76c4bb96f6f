"""The command line: what it prints, and how it tells a user's mistake in one line."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reference import Shape, random_model

from modeltorch import arithmetic, cli
from modeltorch.checkpoint import BUNDLED
from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM

PROMPTS = ["345+678=", "12-345=", "sort 31 4 15 926 5=", "max 271 828 182=", "reverse 1 2 3="]
SUMMARY = r"modeltorch: {tokens} new tokens for {prompts} prompts? in [\d.]+ s, [\d.]+ tokens/s\n"


@pytest.fixture(autouse=True)
def _quiet_machine(monkeypatch):
    """No network, no waiting standard input, and the number of threads as it was."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def given(*prompts: str) -> list[str]:
    return [word for prompt in prompts for word in ("--prompt", prompt)]


def solved(prompts: list[str]) -> list[str]:
    return [f"{prompt} {arithmetic.solve(prompt)}" for prompt in prompts]


# ---- generate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prompts_are_answered_in_order_by_the_bundled_checkpoint(capsys, dtype):
    assert cli.main(["generate", *given(*PROMPTS), "--dtype", dtype]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines() == solved(PROMPTS)
    tokens = sum(len(arithmetic.solve(prompt)) + 1 for prompt in PROMPTS)  # a byte a token, and the end
    assert re.fullmatch(SUMMARY.format(tokens=tokens, prompts=len(PROMPTS)), output.err)


def test_json_gives_one_object_a_line(capsys):
    assert cli.main(["generate", *given(*PROMPTS), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (end,) = FlashQwen2ForCausalLM.from_pretrained(BUNDLED).stop_tokens
    for prompt, line in zip(PROMPTS, lines, strict=True):
        answer = arithmetic.solve(prompt)
        assert line == {
            "prompt": prompt,
            "text": answer,
            "token_ids": [*answer.encode(), end],
            "finish_reason": "stop",
        }


@pytest.mark.parametrize(
    "text",
    ["1+1=\n2+2=\n", "1+1=\n2+2=", "\n1+1=\n\n   \n2+2=\n\n", "1+1=\r\n2+2=\r\n"],
    ids=["lines", "no end of line", "empty lines", "lines of Windows"],
)
def test_without_a_prompt_each_line_of_standard_input_is_one(capsys, monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text, newline="\n"))
    assert cli.main(["generate"]) == 0
    assert capsys.readouterr().out.splitlines() == solved(["1+1=", "2+2="])


def test_a_prompt_that_is_given_leaves_standard_input_alone(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1+1=\n"))
    assert cli.main(["generate", *given("2+2=")]) == 0
    assert capsys.readouterr().out.splitlines() == solved(["2+2="])
    assert sys.stdin.read() == "1+1=\n"


def answered(capsys: pytest.CaptureFixture, *options: str) -> list[dict]:
    assert cli.main(["generate", "--json", *options]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_options_reach_the_engine(capsys):
    (whole,) = answered(capsys, *given("345+678="))
    (short,) = answered(capsys, *given("345+678="), "--max-new-tokens", "2")
    assert (short["token_ids"], short["finish_reason"]) == (whole["token_ids"][:2], "length")
    (long,) = answered(capsys, *given("345+678="), "--max-new-tokens", "9", "--ignore-eos")
    assert (long["token_ids"][: len(whole["token_ids"])], len(long["token_ids"])) == (whole["token_ids"], 9)
    torch.manual_seed(0)
    hot = answered(capsys, *given(*["345+678="] * 8), "--temperature", "20", "--max-new-tokens", "9")
    assert len({tuple(line["token_ids"]) for line in hot}) > 4
    hot_options = ["--temperature", "20", "--max-new-tokens", "9"]
    (first,) = answered(capsys, *given("345+678="), *hot_options, "--top-k", "1")
    assert first["token_ids"] == whole["token_ids"]
    (first,) = answered(capsys, *given("345+678="), *hot_options, "--top-p", "1e-9")
    assert first["token_ids"] == whole["token_ids"]
    seeded = [answered(capsys, *given("345+678="), *hot_options, "--seed", seed) for seed in ("1", "1", "2")]
    assert seeded[0] == seeded[1] != seeded[2]
    answered(capsys, *given("1+1="), "--threads", "1")
    assert torch.get_num_threads() == 1


def test_text_that_is_not_ascii_comes_back_as_it_was(capsys):
    prompt = "日本語 ∑ 😀"
    (line,) = answered(capsys, *given(prompt), "--max-new-tokens", "3")
    assert line["prompt"] == prompt
    assert cli.main(["generate", *given(prompt), "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith(prompt)


def test_a_checkpoint_of_ones_own_is_opened(capsys, tmp_path):
    for path in BUNDLED.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((BUNDLED / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 6}))
    assert cli.main(["generate", "--model", str(tmp_path), *given("1+1=")]) == 0
    assert capsys.readouterr().out.splitlines() == solved(["1+1="])
    assert cli.main(["generate", "--model", str(tmp_path), *given("11+1=", "345+678=")]) == 2
    assert "6 positions" in capsys.readouterr().err


# ---- mistakes ---------------------------------------------------------------------------------------


def without_tokenizer(folder: Path) -> Path:
    random_model(Shape()).save_pretrained(folder)
    return folder


def cut_off(folder: Path) -> Path:
    without_tokenizer(folder)
    os.truncate(folder / "model.safetensors", 1000)
    return folder


def without_json(folder: Path) -> Path:
    without_tokenizer(folder)
    (folder / "config.json").write_text("{")
    return folder


def with_empty_tokenizer(folder: Path) -> Path:
    without_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def without_heads(folder: Path) -> Path:
    without_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))
    return folder


PROMPT = given("1+1=")
MISTAKES: dict[str, tuple[list, list[str]]] = {
    "no prompt": ([], ["prompt"]),
    "an empty prompt": (given(""), ["prompt"]),
    "no such folder": ([*PROMPT, "--model", "/no/such/folder"], ["/no/such/folder"]),
    "no such hub id": ([*PROMPT, "--model", "nobody/nothing"], ["nobody/nothing"]),
    "an empty model": ([*PROMPT, "--model", ""], ["checkpoint", "folder"]),
    "a checkpoint without a tokenizer": ([*PROMPT, "--model", without_tokenizer], ["tokenizer"]),
    "a checkpoint cut off": ([*PROMPT, "--model", cut_off], ["model.safetensors"]),
    "a configuration that is no JSON": ([*PROMPT, "--model", without_json], ["config.json"]),
    "a tokenizer that is empty": ([*PROMPT, "--model", with_empty_tokenizer], ["tokenizer.json"]),
    "a configuration without heads": ([*PROMPT, "--model", without_heads], ["config.json", "num_attention_heads"]),
    "no new tokens": ([*PROMPT, "--max-new-tokens", "0"], ["max_new_tokens", "0"]),
    "too many new tokens": ([*PROMPT, "--max-new-tokens", "99999999999"], ["99999999999", "positions"]),
    "a top_p above 1": ([*PROMPT, "--top-p", "1.5"], ["top_p", "1.5"]),
    "a temperature below 0": ([*PROMPT, "--temperature", "-1"], ["temperature", "-1"]),
    "a temperature that is no number": ([*PROMPT, "--temperature", "nan"], ["temperature", "nan"]),
    "an unknown device": ([*PROMPT, "--device", "toaster"], ["device", "toaster"]),
    "no threads": ([*PROMPT, "--threads", "0"], ["--threads", "0"]),
    "more threads than a number holds": ([*PROMPT, "--threads", "9" * 20], ["--threads", "9" * 20]),
    "text that is no text": (given("\udcff\udcfe"), ["prompt"]),
}


def assert_one_line(error: str, words: list[str]) -> None:
    assert re.fullmatch(r"modeltorch: [^\n]+\n", error), error
    assert all(word in error for word in words), error


@pytest.mark.parametrize(("options", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_in_one_line(capsys, tmp_path, options, words):
    made: list[str] = [str(word(tmp_path / "it")) if isinstance(word, Callable) else word for word in options]
    capsys.readouterr()  # what transformers printed while it saved
    assert cli.main(["generate", *made]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert_one_line(output.err, words)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["translate"],
        ["generate", "--no-such-option"],
        ["generate", "--dtype", "int3"],
        ["generate", "--max-new-tokens", "many"],
        ["generate", "--temperature", "warm"],
        ["generate", "--threads", "two"],
        ["generate", "--threads", "1.5"],
    ],
    ids=" ".join,
)
def test_options_that_do_not_parse_end_with_status_2_and_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("usage: modeltorch")


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_a_failure_is_told_in_one_line_with_the_place_it_came_from(capsys, monkeypatch, error):
    def fails(*arguments, **keywords):
        raise error("DefaultAllocator: cannot\nallocate 5 bytes")

    monkeypatch.setattr(FlashQwen2ForCausalLM, "generate", fails)
    assert cli.main(["generate", *PROMPT]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert_one_line(output.err, ["cannot allocate 5 bytes", error.__name__, "test_cli.py:", "fails"])


def test_an_interrupt_ends_the_command_without_a_traceback(capsys, monkeypatch):
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(FlashQwen2ForCausalLM, "generate", interrupted)
    try:
        status = cli.main(["generate", *PROMPT])
    except KeyboardInterrupt:
        pytest.fail("the interrupt came through")
    assert status == 130  # 128 and the number of SIGINT, as shells count
    assert capsys.readouterr().out == ""


# ---- as a process -----------------------------------------------------------------------------------


def process(*arguments: str, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "modeltorch", *arguments],
        capture_output=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        **options,
    )


def test_the_module_is_the_command():
    run = process("generate", "--threads", "1", input=b"345+678=\nmax 3 20 100=\n")
    assert run.returncode == 0
    assert run.stdout.decode().splitlines() == solved(["345+678=", "max 3 20 100="])
    assert re.fullmatch(SUMMARY.format(tokens=9, prompts=2), run.stderr.decode())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--model", "/no/such/folder", *PROMPT], ["/no/such/folder"]),
        (["generate", "--threads", "1000000", *PROMPT], ["--threads", "1000000"]),
    ],
    ids=["no such folder", "more threads than a machine can have"],
)
def test_a_mistake_ends_a_process_with_status_2_and_no_traceback(arguments, words):
    run = process(*arguments, stdin=subprocess.DEVNULL)
    assert run.returncode == 2
    assert run.stdout == b""
    assert_one_line(run.stderr.decode(), words)


def test_a_reader_that_goes_away_is_no_error_of_ours():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        run = subprocess.run(
            [sys.executable, "-m", "modeltorch", "generate", "--threads", "1", *PROMPT],
            stdout=writer,
            stderr=subprocess.PIPE,
        )
    finally:
        os.close(writer)
    assert b"Broken" not in run.stderr
    assert b"Traceback" not in run.stderr
