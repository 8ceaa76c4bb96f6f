"""What is said of checkpoints that are damaged, incomplete or of another kind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import INDEX, SINGLE, edit_json, edit_weights, opened, written
from reference import Shape

from modeltorch import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread", "offline")


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, lambda weights: weights.pop(name))


def reshape(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, lambda weights: weights.update({name: torch.ones(shape)}))


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def overwrite(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def cut_in_half(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def old_rope(**scaling: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(
        folder / "config.json", remove=("rope_parameters",), rope_theta=1e4, rope_scaling=scaling
    )


def new_rope(**parameters: object) -> Callable[[Path], None]:
    return config(rope_parameters={"rope_theta": 1e4, **parameters})


def generation(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "generation_config.json", **changes)


def with_tokenizer(name: str, content: str | bytes) -> Callable[[Path], None]:
    """The tokenizer of the bundled checkpoint, one of its files being something else."""

    def copy_and_spoil(folder: Path) -> None:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(checkpoint.BUNDLED / file, folder)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return copy_and_spoil


VOCAB = Shape().vocab
LAST_NORM = "model.layers.1.post_attention_layernorm.weight"


DOWN = "model.layers.1.mlp.down_proj.weight"


BROKEN = {
    "no config": (remove("config.json"), FileNotFoundError, ["config.json"]),
    "a config that is no JSON": (overwrite("config.json", "{"), ValueError, ["config.json"]),
    "a config that is a list": (overwrite("config.json", "[]"), ValueError, ["config.json"]),
    "a config without model_type": (overwrite("config.json", "{}"), ValueError, ["model_type"]),
    "no weights": (remove(SINGLE), FileNotFoundError, [SINGLE, INDEX]),
    "weights cut off": (cut_in_half(SINGLE), ValueError, [SINGLE]),
    "weights that are something else": (overwrite(SINGLE, "<html>"), ValueError, [SINGLE]),
    "a missing norm": (drop(LAST_NORM), ValueError, ["lacks", LAST_NORM]),
    "a missing bias": (drop("model.layers.0.self_attn.k_proj.bias"), ValueError, ["lacks", "k_proj.bias"]),
    "a missing head that is not tied": (drop("lm_head.weight"), ValueError, ["lacks", "lm_head.weight"]),
    "a layer too few": (config(num_hidden_layers=3, layer_types=None), ValueError, ["lacks", "layers.2."]),
    "a matrix of the wrong shape": (reshape(DOWN, 64, 95), ValueError, ["down", "[64, 95]", "96"]),
    "a norm of the wrong shape": (reshape(LAST_NORM, 63), ValueError, ["norm", "[63]", "64"]),
    "too many heads": (config(num_attention_heads=8), ValueError, ["128", "[64, 64]"]),
    "another vocabulary": (config(vocab_size=500), ValueError, ["embed", "500", "152"]),
    "another hidden size": (config(hidden_size=128), ValueError, ["embed", "128", "64"]),
    "another architecture": (config(model_type="llama"), NotImplementedError, ["model_type", "llama"]),
    "an unknown architecture": (config(model_type="zork"), NotImplementedError, ["model_type", "zork"]),
    "a sliding window": (config(use_sliding_window=True), NotImplementedError, ["use_sliding_window"]),
    "another activation": (config(hidden_act="gelu"), NotImplementedError, ["hidden_act", "gelu"]),
    "old yarn": (old_rope(type="yarn", factor=4.0), NotImplementedError, ["rope scaling", "yarn"]),
    "new yarn": (new_rope(rope_type="yarn", factor=4.0), NotImplementedError, ["rope scaling", "yarn"]),
    "dynamic": (new_rope(rope_type="dynamic", factor=4.0), NotImplementedError, ["rope scaling", "dynamic"]),
    "linear without a factor": (new_rope(rope_type="linear"), ValueError, ["factor"]),
    "linear of factor 0": (new_rope(rope_type="linear", factor=0.0), ValueError, ["factor", "0"]),
    "a theta that is text": (new_rope(rope_type="default", rope_theta="x"), ValueError, ["config.json", "rope_theta"]),
    "a theta below 0": (new_rope(rope_type="default", rope_theta=-1.0), ValueError, ["config.json", "-1"]),
    "layers unlike layer_types": (config(num_hidden_layers=3), ValueError, ["config.json", "layer_types", "3", "2"]),
    "no epsilon": (config(rms_norm_eps=None), ValueError, ["config.json", "rms_norm_eps", "None"]),
    "an epsilon below 0": (config(rms_norm_eps=-1e-6), ValueError, ["config.json", "rms_norm_eps", "-1e-06"]),
    "no heads": (config(num_attention_heads=0), ValueError, ["config.json", "num_attention_heads", "0"]),
    "heads that share keys unevenly": (config(num_key_value_heads=3), ValueError, ["config.json", "4 and 3"]),
    "no vocabulary": (config(vocab_size=0), ValueError, ["config.json", "vocab_size", "0"]),
    "positions below 0": (config(max_position_embeddings=-5), ValueError, ["config.json", "max_position", "-5"]),
    "positions beyond 32 bits": (config(max_position_embeddings=10**11), ValueError, ["config.json", "100000000000"]),
    "positions that are a fraction": (
        config(max_position_embeddings=1e11),
        ValueError,
        ["config.json", "100000000000"],
    ),
    "an end that is an object": (
        generation(eos_token_id={"id": 2}),
        ValueError,
        ["generation_config.json", "eos", "{"],
    ),
    "an end in a list in a list": (generation(eos_token_id=[[2]]), ValueError, ["generation_config.json", "[[2]]"]),
    "an end that is text": (generation(eos_token_id="x"), ValueError, ["generation_config.json", "eos", "x"]),
    "an end that is true": (generation(eos_token_id=True), ValueError, ["generation_config.json", "eos", "true"]),
    "an end outside the vocabulary": (
        generation(eos_token_id=VOCAB),
        ValueError,
        ["generation_config.json", str(VOCAB)],
    ),
    "an end below 0": (config(eos_token_id=-1), ValueError, ["config.json", "eos_token_id", "-1"]),
    "an end of the configuration that is text": (config(eos_token_id="x"), ValueError, ["config.json", "eos", "x"]),
    "no JSON about generation": (overwrite("generation_config.json", "{"), ValueError, ["generation_config.json"]),
    "an empty tokenizer": (with_tokenizer("tokenizer.json", "{}"), ValueError, ["tokenizer.json", "added_tokens"]),
    "a tokenizer cut off": (with_tokenizer("tokenizer.json", '{"version": '), ValueError, ["tokenizer.json", "JSON"]),
    "a tokenizer that is a list": (with_tokenizer("tokenizer.json", "[]"), ValueError, ["tokenizer.json", "list"]),
    "a tokenizer that is no text": (with_tokenizer("tokenizer.json", b"\xff"), ValueError, ["tokenizer.json", "JSON"]),
    "a tokenizer_config cut off": (with_tokenizer("tokenizer_config.json", "{"), ValueError, ["tokenizer_config.json"]),
}


def assert_one_sentence_names(error: BaseException, words: list[str]) -> None:
    message = str(error)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("spoil", "kind", "words"), BROKEN.values(), ids=BROKEN)
def test_one_exception_names_what_is_wrong_with_a_checkpoint(tmp_path, spoil, kind, words):
    folder = written(tmp_path / "it")
    spoil(folder)
    with pytest.raises(kind) as caught:
        opened(folder)
    assert_one_sentence_names(caught.value, words)


def test_positions_whose_tables_do_not_fit_the_memory_are_refused_before_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr("modeltorch.configuration.available_memory", lambda: 2**30)
    folder = written(tmp_path / "it")
    edit_json(folder / "config.json", max_position_embeddings=2**31 - 1)
    with pytest.raises(ValueError) as caught:
        opened(folder)
    assert_one_sentence_names(caught.value, ["config.json", "max_position_embeddings", "1.0 GiB", "lower"])


def delete_second_shard(folder: Path) -> str:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    return shard.name


def move_norm_in_the_index(folder: Path) -> str:
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    other = next(file for file in files.values() if file != files["model.norm.weight"])
    edit_json(folder / INDEX, weight_map=files | {"model.norm.weight": other})
    return "model.norm.weight"


def forget_the_weight_map(folder: Path) -> str:
    edit_json(folder / INDEX, remove=("weight_map",))
    return INDEX


def list_the_weight_map(folder: Path) -> str:
    edit_json(folder / INDEX, weight_map=["model.norm.weight"])
    return INDEX


def number_a_shard(folder: Path) -> str:
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map=files | {"model.norm.weight": 1})
    return "model.norm.weight"


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (delete_second_shard, FileNotFoundError),
        (move_norm_in_the_index, ValueError),
        (forget_the_weight_map, ValueError),
        (list_the_weight_map, ValueError),
        (number_a_shard, ValueError),
    ],
)
def test_one_exception_names_what_is_wrong_with_a_sharded_checkpoint(tmp_path, spoil, kind):
    folder = written(tmp_path / "it", shard_size="50KB")
    named = spoil(folder)
    with pytest.raises(kind) as caught:
        opened(folder)
    assert_one_sentence_names(caught.value, [str(folder), named])


@pytest.mark.parametrize("name", ["nowhere/at-all", "nowhere", "./nowhere", "a/b/c", "/no/such/folder"])
def test_a_name_that_is_neither_a_folder_nor_a_reachable_hub_id_is_told(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        opened(name)
    assert_one_sentence_names(caught.value, [name])


def test_a_file_in_place_of_a_folder_is_told(tmp_path):
    folder = written(tmp_path / "it")
    with pytest.raises(FileNotFoundError, match="folder"):
        opened(folder / SINGLE)
