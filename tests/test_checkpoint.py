"""Checkpoints as transformers writes them: what is read, how it is held, where answers end."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import INDEX, edit_json, edit_weights, opened, written
from reference import Shape, reference_logits, relative_error
from transformers import Qwen2ForCausalLM

from modeltorch import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread", "offline")

SEQUENCES = [[5, 9, 2, 77, 31, 8, 150, 0], [3], list(range(60, 100))]


def assert_equals_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Logits of every position: equal in float32, no worse than transformers' own in a smaller type."""
    model = opened(folder, dtype)
    same = Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    float64 = copy.deepcopy(same).double()
    for tokens, logits in zip(SEQUENCES, model.compute_logits(SEQUENCES), strict=True):
        assert logits.shape == (len(tokens), model.vocab_size)
        assert logits.dtype == torch.float32
        theirs = reference_logits(same, tokens)
        if dtype == torch.float32:
            assert relative_error(logits, theirs) < 1e-4
        else:
            exact = reference_logits(float64, tokens)
            assert relative_error(logits, exact) <= 1.5 * relative_error(theirs, exact)


# ---- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: f"file-{dtype}")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard_size", ["1GB", "50KB"], ids=["single", "sharded"])
def test_a_checkpoint_gives_the_logits_of_transformers(tmp_path, shard_size, tied, file_dtype, dtype):
    # transformers' own error is the yardstick in bfloat16: a model of some width keeps it from being luck.
    shape = Shape(hidden=96, intermediate=160, tied=tied)
    folder = written(tmp_path / "it", shape, file_dtype, shard_size)
    assert (folder / INDEX).exists() == (shard_size == "50KB")
    assert_equals_transformers(folder, dtype)


def test_a_head_size_of_its_own_is_read_from_the_configuration(tmp_path):
    assert_equals_transformers(written(tmp_path / "it", Shape(heads=6, kv_heads=3, head_size=32)))


def test_the_head_size_follows_from_the_hidden_size_where_the_configuration_has_none(tmp_path):
    folder = written(tmp_path / "it")
    edit_json(folder / "config.json", remove=("head_dim",))
    assert_equals_transformers(folder)


ROPE = {
    "old theta": {"rope_theta": 1e6},
    "old linear, key type": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "old linear, key rope_type": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "old linear, theta left out": {"rope_scaling": {"type": "linear", "factor": 8.0}},
    "new theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "new linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}},
}


@pytest.mark.parametrize("rope", ROPE.values(), ids=ROPE)
def test_rope_is_read_in_the_old_and_the_new_spelling(tmp_path, rope):
    folder = written(tmp_path / "it")
    plain = opened(folder).compute_logits(SEQUENCES[:1])[0]
    edit_json(folder / "config.json", remove=("rope_parameters",), **rope)
    assert_equals_transformers(folder)
    assert relative_error(opened(folder).compute_logits(SEQUENCES[:1])[0], plain) > 1e-2


def test_rope_that_is_not_mentioned_at_all_takes_the_default_theta(tmp_path):
    folder = written(tmp_path / "it")
    edit_json(folder / "config.json", remove=("rope_parameters",))
    assert_equals_transformers(folder)


def test_tensors_that_the_model_does_not_have_are_left_alone(tmp_path):
    folder = written(tmp_path / "it")
    edit_weights(folder, lambda weights: weights.update({"model.layers.0.self_attn.x": torch.ones(3)}))
    assert_equals_transformers(folder)


@pytest.mark.parametrize("equal", [True, False], ids=["the same head", "another head"])
def test_a_tied_configuration_beside_a_head_in_the_file_is_read_as_transformers_reads_it(tmp_path, equal):
    folder = written(tmp_path / "it", Shape(tied=True))

    def add_head(weights: dict[str, torch.Tensor]) -> None:
        embedding = weights["model.embed_tokens.weight"]
        weights["lm_head.weight"] = embedding.clone() if equal else embedding.flip(0).contiguous()

    edit_weights(folder, add_head)
    assert_equals_transformers(folder)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_may_be_text_or_a_path(tmp_path, kind):
    folder = written(tmp_path / "it")
    assert opened(kind(folder)).compute_logits([[1, 2]])[0].shape == (2, Shape().vocab)


# ---- how it is held --------------------------------------------------------------------------------


def test_reading_a_tensor_twice_gives_the_same_memory(tmp_path):
    weights = checkpoint.SafetensorsWeights(written(tmp_path / "it", shard_size="50KB"))
    assert len(weights) == len(list(weights)) > 20
    for name in weights:
        assert weights[name].data_ptr() == weights[name].data_ptr()


def mapped_ranges(folder: Path) -> list[range]:
    """Where this process has the weight files of a folder mapped."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors") and f" {folder.resolve()}/" in line:
            first, last = line.split(maxsplit=1)[0].split("-")
            ranges.append(range(int(first, 16), int(last, 16)))
    return ranges


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("shard_size", ["1GB", "50KB"], ids=["single", "sharded"])
def test_weights_of_the_models_dtype_lie_in_the_mapped_files(tmp_path, shard_size):
    folder = written(tmp_path / "it", Shape(), torch.bfloat16, shard_size)
    weights = [tensor for tensor in opened(folder, torch.bfloat16).get_weights() if tensor.numel() > 1]
    ranges = mapped_ranges(folder)
    assert len(weights) == len(checkpoint.SafetensorsWeights(folder))
    assert all(any(weight.data_ptr() in one for one in ranges) for weight in weights)


MEASURE = """
import json, sys, torch
from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024

def use(model):
    model.generate([[1, 2, 3]], max_new_tokens=4)

use(FlashQwen2ForCausalLM.from_pretrained(sys.argv[2], dtype=sys.argv[3], block_size=16, num_blocks=4))
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
before = status("VmRSS")
model = FlashQwen2ForCausalLM.from_pretrained(sys.argv[1], dtype=sys.argv[3], block_size=16, num_blocks=4)
use(model)
print(json.dumps({"resident": status("VmRSS") - before, "peak": status("VmHWM") - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize(
    ("stored", "dtype", "resident", "peak"),
    [("bfloat16", "bfloat16", 1.1, 1.1), ("bfloat16", "float32", 1.1, 1.6), ("float32", "bfloat16", 1.25, 3.2)],
)
def test_a_loaded_model_holds_each_weight_once(tmp_path, stored, dtype, resident, peak):
    """While it loads too, if nothing is converted; else the mapped file, whose pages can go, as well."""
    shape = Shape(hidden=512, intermediate=4096, heads=8, kv_heads=8, head_size=64, layers=16, vocab=4000)
    folder = written(tmp_path / "large", shape, getattr(torch, stored), "64MB")
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    weights = files * getattr(torch, dtype).itemsize / getattr(torch, stored).itemsize
    small = written(tmp_path / "small", Shape(), torch.bfloat16)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(small), dtype], capture_output=True, text=True, check=True
    )
    grown = json.loads(run.stdout)
    assert 0.9 * weights < grown["resident"] < resident * weights
    assert grown["peak"] < peak * weights


class Recorder:
    """Stands before a step object and keeps what set_weight is given."""

    def __init__(self, operation: torch.ScriptObject) -> None:
        self.operation = operation
        self.weights: list[torch.Tensor] = []

    def set_weight(self, weights: list[torch.Tensor]) -> int:
        self.weights = weights
        return self.operation.set_weight(weights)

    def __getattr__(self, name: str) -> object:
        return getattr(self.operation, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["mapped", "converted"])
def test_both_objects_hold_the_same_tensors_and_a_tied_head_is_the_embedding(tmp_path, dtype):
    model = opened(written(tmp_path / "it", Shape(tied=True), torch.float32), dtype)
    recorders = Recorder(model.acl_encoder_operation), Recorder(model.acl_decoder_operation)
    model.acl_encoder_operation, model.acl_decoder_operation = recorders
    model.init_ascend_weight()
    prefill, decode = (recorder.weights for recorder in recorders)
    assert len(prefill) == len(decode) == len(model.ascend_weight) > 100
    for first, second, kept in zip(prefill, decode, model.ascend_weight, strict=True):
        assert first is second is kept
    embedding, head = model.ascend_weight[0], model.ascend_weight[-1]
    assert head is embedding
    assert head.dtype == dtype


# ---- tokenizer and end of an answer ----------------------------------------------------------------


def test_a_checkpoint_without_a_tokenizer_takes_token_lists_and_refuses_text(tmp_path):
    model = opened(written(tmp_path / "it"))
    (answer,) = model.generate([[1, 2, 3]], max_new_tokens=4)
    assert len(answer.token_ids) == 4
    assert answer.text is None
    with pytest.raises(ValueError, match="no tokenizer"):
        model.generate(["1+1="], max_new_tokens=4)
    assert model.cache.free_blocks == model.cache.num_blocks


def test_a_checkpoint_with_a_tokenizer_takes_text_token_lists_and_both_at_once(tmp_path):
    folder = written(tmp_path / "it", Shape(vocab=258))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint.BUNDLED / name, folder)
    model = opened(folder)
    ids = model.encode("12+3=")
    assert len(ids) > 1
    text, tokens = model.generate(["12+3=", ids], max_new_tokens=6)
    assert text == tokens
    assert text.text == model.tokenizer.decode(text.token_ids, skip_special_tokens=True)


FIRST, SECOND, ABSENT = "first", "second", 150


ENDS = {
    "null": (None, {}, None),
    "a number": (SECOND, {}, SECOND),
    "a list": ([ABSENT, FIRST], {}, FIRST),
    "an empty list": ([], {}, None),
    "generation_config overrides a number": (FIRST, {"eos_token_id": SECOND}, SECOND),
    "generation_config overrides null": (None, {"eos_token_id": [FIRST, ABSENT]}, FIRST),
    "generation_config that says nothing": (SECOND, {"do_sample": False}, SECOND),
    "no generation_config": (SECOND, None, SECOND),
}


@pytest.mark.parametrize(("in_config", "generation_config", "expected"), ENDS.values(), ids=ENDS)
def test_answers_end_at_the_token_that_the_checkpoint_names(tmp_path, in_config, generation_config, expected):
    folder = written(tmp_path / "it")
    prompt = [7, 3]
    free = opened(folder).generate([prompt], max_new_tokens=8)[0].token_ids
    second = next(token for token in free if token != free[0])
    assert ABSENT not in free

    def resolved(value: object) -> object:
        if isinstance(value, list):
            return [resolved(item) for item in value]
        return {FIRST: free[0], SECOND: second}.get(value, value)  # type: ignore[arg-type]

    edit_json(folder / "config.json", eos_token_id=resolved(in_config))
    path = folder / "generation_config.json"
    path.unlink()
    if generation_config is not None:
        path.write_text(json.dumps({key: resolved(value) for key, value in generation_config.items()}))
    (answer,) = opened(folder).generate([prompt], max_new_tokens=8)
    if expected is None:
        assert (answer.token_ids, answer.finish_reason) == (free, "length")
    else:
        end = free.index(resolved(expected)) + 1
        assert (answer.token_ids, answer.finish_reason) == (free[:end], "stop")
