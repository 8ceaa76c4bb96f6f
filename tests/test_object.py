"""The model object: its name, the order of its calls, and what replaces what."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from model_objects import PROMPTS, SHAPE, Prefill, make_runner, new, new_caches, parameter_text, shape_text, weights_of
from reference import DEVICES, Layout, Runner, Shape, random_model, weight_list

pytestmark = pytest.mark.usefixtures("one_thread")
every_device = pytest.mark.parametrize("device", DEVICES)

KNOWN_NAMES = ["qwen_PAModel", "qwen_FAModel", "qwen_DecoderModel", "qwen_QwenDecoderModel"]


# ---- names and order -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "no_such_model", "llama_LlamaDecoderModel", "qwen", "Qwen_PAModel"])
def test_any_name_constructs_and_set_param_refuses_an_unknown_one_with_the_known_ones(name):
    made = new(name)
    assert made.progress() == 0.0
    assert set(made.counters().values()) == {0}
    with pytest.raises(ValueError, match="unknown model name") as error:
        made.set_param(parameter_text())
    for known in [name, *KNOWN_NAMES]:
        assert known in str(error.value)
    with pytest.raises(RuntimeError, match="set_param"):
        made.set_weight([])


def _call(made: torch.ScriptObject, method: str) -> None:
    arguments = {
        "execute": ([], "{}"),
        "execute_out": ([], [], "{}"),
        "set_weight": ([],),
        "set_kv_cache": ([], []),
    }
    getattr(made, method)(*arguments.get(method, ()))


def test_there_is_nothing_to_settle_on_a_cpu():
    made = new()
    assert made.settle() == 0
    made.set_param(parameter_text())
    assert made.settle() == 0


@pytest.mark.parametrize(
    ("done", "method", "missing"),
    [
        ("", "execute", "set_param"),
        ("", "execute_out", "set_param"),
        ("", "set_weight", "set_param"),
        ("", "set_kv_cache", "set_param"),
        ("", "weight_spec", "set_param"),
        ("", "graph", "set_param"),
        ("param", "execute", "set_weight"),
        ("param", "execute_out", "set_weight"),
        ("param", "graph", "set_weight"),
        ("param caches", "execute", "set_weight"),
        ("param caches", "execute_out", "set_weight"),
        ("param weights", "execute", "set_kv_cache"),
        ("param weights", "execute_out", "set_kv_cache"),
    ],
)
def test_a_call_out_of_order_says_which_one_is_missing(done, method, missing):
    made = new()
    if "param" in done:
        assert made.set_param(parameter_text()) == 0
    if "weights" in done:
        assert made.set_weight(weights_of(made)) == 0
    if "caches" in done:
        assert made.set_kv_cache(new_caches(), new_caches()) == 0
    with pytest.raises(RuntimeError, match=missing) as error:
        _call(made, method)
    assert type(error.value) is RuntimeError
    assert method in str(error.value)
    for other in {"set_param", "set_weight", "set_kv_cache"} - {missing, method}:
        assert other not in str(error.value)


@every_device
def test_weights_and_caches_may_come_in_either_order_and_again(device):
    runner = make_runner(device=device)
    step = runner.prefill_inputs(PROMPTS)
    expected = runner.encoder.execute(*step)[0]
    for order in itertools.permutations(["weights", "caches", "weights", "caches"]):
        made = new()
        made.set_param(parameter_text())
        for call in order:
            if call == "weights":
                made.set_weight(weights_of(made, device=device))
            else:
                made.set_kv_cache(runner.caches[0::2], runner.caches[1::2])
        assert torch.equal(made.execute(*step)[0], expected)


# ---- replacement -----------------------------------------------------------------------------------


@every_device
def test_set_param_again_replaces_the_model_and_asks_for_weights_and_caches_again(device):
    prefill = Prefill(device)
    prefill.logits()
    prefill.made.set_param(parameter_text(numHiddenLayers=1, packQuantType=[], linearQuantType=[],
                                          linearTransposeType=[]))  # fmt: skip
    assert prefill.made.progress() == 0.0
    assert prefill.made.counters()["executions"] == 0
    with pytest.raises(RuntimeError, match="set_weight"):
        prefill.logits()
    one_layer = Shape(layers=1)
    other = Runner(one_layer, random_model(one_layer), device=device)
    spec = [entry for entry in json.loads(prefill.made.weight_spec()) if "bias" not in entry["name"]]
    assert max(entry["slot"] for entry in spec) == 52
    weights = weight_list(json.loads(other.encoder.weight_spec()), other.model, Layout(), torch.float32)
    prefill.made.set_weight([weight.to(device) for weight in weights])
    with pytest.raises(RuntimeError, match="set_kv_cache"):
        prefill.logits()
    prefill.made.set_kv_cache(other.caches[0::2], other.caches[1::2])
    step = other.prefill_inputs(PROMPTS)
    assert torch.equal(prefill.made.execute(*step)[0], other.encoder.execute(*step)[0])


@every_device
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        parameter_text(worldSize=2),
        parameter_text(isFA=True),
        parameter_text(rmsNormEps="1e-6"),
        parameter_text(numHiddenLayers=0),
        parameter_text(linearTransposeType=[[1] * 6] * SHAPE.layers),
        parameter_text(linearQuantType=[[1] * 7] * SHAPE.layers),
    ],
)
def test_a_failed_set_param_leaves_the_old_model_whole(text, device):
    prefill = Prefill(device)
    before, spec, graph = prefill.logits(), prefill.made.weight_spec(), prefill.made.graph()
    counters = dict(prefill.made.counters())
    with pytest.raises((ValueError, NotImplementedError), match="set_param"):
        prefill.made.set_param(text)
    assert prefill.made.progress() == 1.0
    assert (prefill.made.weight_spec(), prefill.made.graph()) == (spec, graph)
    assert dict(prefill.made.counters()) == counters
    assert torch.equal(prefill.logits(), before)
    assert prefill.made.counters()["plans_built"] == counters["plans_built"]


@every_device
def test_set_weight_again_replaces_every_weight(device):
    runner = make_runner(device=device)
    step = runner.prefill_inputs(PROMPTS)
    first = runner.encoder.execute(*step)[0]
    runner.encoder.set_weight(weights_of(runner.encoder, 1, device))
    second = runner.encoder.execute(*step)[0]
    assert not torch.equal(first, second)
    fresh = make_runner(seed=1, device=device)
    fresh.encoder.set_kv_cache(runner.caches[0::2], runner.caches[1::2])
    assert torch.equal(second, fresh.encoder.execute(*step)[0])


@every_device
@pytest.mark.parametrize("change", [-1, 1, "none"])
def test_a_weight_list_of_the_wrong_length_is_refused_and_the_old_weights_stay(change, device):
    prefill = Prefill(device)
    before = prefill.logits()
    weights = weights_of(prefill.made, 1, device)
    count = len(weights)
    wrong = {-1: weights[:-1], 1: [*weights, weights[-1]], "none": []}[change]
    with pytest.raises(ValueError, match=rf"set_weight.*\b{count}\b.*\b{len(wrong)}\b"):
        prefill.made.set_weight(wrong)
    assert torch.equal(prefill.logits(), before)


FAULTY_WEIGHTS = {
    "bfloat16": lambda weight: weight.bfloat16(),
    "float64": lambda weight: weight.double(),
    "int8": lambda weight: weight.to(torch.int8),
    "one row more": lambda weight: torch.cat([weight, weight[:2]]),
    "one dimension more": lambda weight: weight[None],
    "a placeholder": lambda weight: torch.ones(1, device=weight.device),
    "nothing in it": lambda weight: weight[:0],
    "meta": lambda weight: weight.to("meta"),
    "cpu": lambda weight: weight.cpu(),
    "sparse": lambda weight: weight.to_sparse(),
}


FAULTY_SLOTS = [
    "embedding.weight",
    "layers.0.attn.norm.weight",
    "layers.0.attn.q.weight",
    "layers.1.attn.k.bias",
    "layers.1.attn.v.weight",
    "layers.0.attn.o.weight",
    "layers.1.mlp.norm.weight",
    "layers.0.mlp.gate.weight",
    "layers.1.mlp.up.weight",
    "layers.1.mlp.down.weight",
    "final_norm.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize(
    ("fault", "device"), [(fault, device) for fault in FAULTY_WEIGHTS for device in DEVICES if fault != device]
)
@pytest.mark.parametrize("name", FAULTY_SLOTS)
def test_one_faulty_weight_is_named_and_the_old_weights_stay(name, fault, device):
    prefill = Prefill(device)
    before = prefill.logits()
    slots = {entry["name"]: entry["slot"] for entry in json.loads(prefill.made.weight_spec())}
    weights = weights_of(prefill.made, 1, device)
    wrong = weights[slots[name]] = FAULTY_WEIGHTS[fault](weights[slots[name]])
    with pytest.raises(ValueError, match=r"set_weight.*must") as error:
        prefill.made.set_weight(weights)
    message = str(error.value)
    # A size that the weights themselves decide may only show as a conflict with the next weight that has it.
    if fault in {"one row more", "nothing in it"}:
        assert re.search(r"weight \d+ \(\S+\) must", message)
    else:
        assert f"weight {slots[name]} ({name})" in message
    if fault in {"bfloat16", "int8"}:
        assert "float32" in message
        assert fault in message.split("got")[1]
    elif fault in {"meta", "cpu"}:
        assert device in message
        assert fault in message.split("got")[1]
    elif fault in {"one dimension more", "a placeholder"}:
        assert shape_text(wrong) in message.split("got")[1]
    assert torch.equal(prefill.logits(), before)


@pytest.mark.parametrize(
    ("flag", "dtype", "names"),
    [
        (False, torch.bfloat16, ["isBF16", "bfloat16"]),
        (True, torch.float32, ["isBF16", "float32"]),
        (False, torch.float64, []),
        (False, torch.int32, ["int32"]),
        (False, torch.int8, ["int8"]),
        (False, torch.complex64, []),
    ],
    ids=str,
)
def test_weights_of_a_dtype_that_the_parameters_do_not_ask_for_are_refused(flag, dtype, names):
    made = new()
    made.set_param(parameter_text(isBF16=flag))
    weights = [weight.to(dtype) for weight in weights_of(made)]
    with pytest.raises((ValueError, NotImplementedError), match="set_weight") as error:
        made.set_weight(weights)
    for name in names:
        assert name in str(error.value)
    assert made.progress() == 0.0


@every_device
def test_weights_on_a_device_without_kernels_are_refused_and_the_old_ones_stay(device):
    prefill = Prefill(device)
    before = prefill.logits()
    with pytest.raises((ValueError, NotImplementedError), match="set_weight"):
        prefill.made.set_weight([weight.to("meta") for weight in weights_of(prefill.made)])
    assert torch.equal(prefill.logits(), before)


@dataclass(frozen=True)
class FaultyCaches:
    """What is done to the caches of a good list, and what the message must hold."""

    change: Callable[[list[torch.Tensor], list[torch.Tensor]], object]
    mentions: tuple[str, ...]


def _replace(index: int, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    def change(keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        tensors = [keys, values][index // SHAPE.layers]
        tensors[index % SHAPE.layers] = make(tensors[index % SHAPE.layers])

    return change


def _replace_all(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    def change(keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        keys[:] = [make(tensor) for tensor in keys]
        values[:] = [make(tensor) for tensor in values]

    return change


FAULTY_CACHES = {
    "one key too few": FaultyCaches(lambda k, v: k.pop(), ("2 key", "got 1 and 2")),
    "one value too few": FaultyCaches(lambda k, v: v.pop(), ("2 value", "got 2 and 1")),
    "one value too many": FaultyCaches(lambda k, v: v.append(v[0]), ("got 2 and 3",)),
    "none": FaultyCaches(lambda k, v: (k.clear(), v.clear()), ("got 0 and 0",)),
    "rank 3": FaultyCaches(_replace(1, lambda t: t[0]), ("key cache 1", "[16, 2, 16]")),
    "rank 5": FaultyCaches(_replace(2, lambda t: t[None]), ("value cache 0", "[1, 8, 16, 2, 16]")),
    "heads": FaultyCaches(_replace_all(lambda t: t[:, :, :1] * 1), ("key cache 0", "[8, 16, 1, 16]")),
    "head size": FaultyCaches(_replace_all(lambda t: t[..., :8] * 1), ("key cache 0", "[8, 16, 2, 8]")),
    "fewer blocks in one": FaultyCaches(_replace(3, lambda t: t[:4]), ("value cache 1", "[4, 16, 2, 16]")),
    "no blocks": FaultyCaches(_replace_all(lambda t: t[:0]), ("key cache 0", "[0, 16, 2, 16]")),
    "no rows": FaultyCaches(_replace_all(lambda t: t[:, :0]), ("key cache 0", "[8, 0, 2, 16]")),
    "one bfloat16": FaultyCaches(_replace(1, lambda t: t.bfloat16()), ("key cache 1", "float32", "bfloat16")),
    "one float64": FaultyCaches(_replace(2, lambda t: t.double()), ("value cache 0", "float32")),
    "all bfloat16": FaultyCaches(_replace_all(lambda t: t.bfloat16()), ("cache", "float32", "bfloat16")),
    "all float64": FaultyCaches(_replace_all(lambda t: t.double()), ("cache", "float32")),
    "all int8": FaultyCaches(_replace_all(lambda t: t.to(torch.int8)), ("cache", "float32", "int8")),
    "one meta": FaultyCaches(_replace(3, lambda t: t.to("meta")), ("value cache 1", "{device}")),
    "all meta": FaultyCaches(_replace_all(lambda t: t.to("meta")), ("cache", "{device}")),
    "one cpu": FaultyCaches(_replace(1, lambda t: t.cpu()), ("key cache 1", "{device}", "cpu")),
    "all cpu": FaultyCaches(_replace_all(lambda t: t.cpu()), ("cache", "{device}", "cpu")),
    "strided": FaultyCaches(_replace(0, lambda t: t.repeat(2, 1, 1, 1)[::2]), ("key cache 0", "contiguous")),
}  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "device"),
    [(fault, device) for fault in FAULTY_CACHES for device in DEVICES if fault.split()[-1] != device],
)
def test_faulty_caches_are_named_and_the_old_caches_stay(fault, device):
    prefill = Prefill(device)
    before = prefill.logits()
    keys, values = new_caches(device=device), new_caches(device=device)
    FAULTY_CACHES[fault].change(keys, values)
    with pytest.raises(ValueError, match="set_kv_cache") as error:
        prefill.made.set_kv_cache(keys, values)
    for text in FAULTY_CACHES[fault].mentions:
        assert text.format(device=device) in str(error.value)
    for cache_tensor in prefill.caches:
        cache_tensor.fill_(float("nan"))
    assert torch.equal(prefill.logits(), before)
    assert not all(cache_tensor.isnan().all() for cache_tensor in prefill.caches), "the old caches are in use"


@every_device
@pytest.mark.parametrize("make", [lambda t: t.bfloat16(), lambda t: t.to("meta")], ids=["dtype", "other place"])
def test_caches_that_do_not_go_with_the_weights_are_refused_when_both_are_known(make, device):
    made = new()
    made.set_param(parameter_text())
    keys, values = new_caches(device=device), new_caches(device=device)
    with pytest.raises(ValueError, match="cache"):  # either call may see it
        made.set_kv_cache([make(t) for t in keys], [make(t) for t in values])
        made.set_weight(weights_of(made, device=device))
    made.set_kv_cache(keys, values)
    made.set_weight(weights_of(made, device=device))
    step = make_runner(device=device).prefill_inputs(PROMPTS)
    step[0][6] = torch.arange(5, dtype=torch.int32, device=device)
    assert torch.equal(made.execute(*step)[0], Prefill(device).logits())
