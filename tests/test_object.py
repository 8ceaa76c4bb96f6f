"""The life of one object: order of calls, replacement, what it keeps, and what it refuses at every call."""

from __future__ import annotations

import gc
import itertools
import json
import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from reference import Layout, Runner, Shape, parameters, random_model, weight_list

SHAPE = Shape()
PROMPTS = [[1, 2, 3], [4, 5]]
KNOWN_NAMES = ["qwen_PAModel", "qwen_FAModel", "qwen_DecoderModel", "qwen_QwenDecoderModel"]
GENERATIONS = {"2024": Layout("qwen_PAModel"), "current": Layout("qwen_QwenDecoderModel")}
PHASES = ["prefill", "decode"]
INPUT_NAMES = {
    "2024": [
        "input_ids",
        "position_ids",
        "cos_table",
        "sin_table",
        "attention_mask",
        "block_tables",
        "slots",
        "kv_cache_idx",
        "token_offset",
        "seq_len",
        "logits_indices",
        "placeholder",
    ],
    "current": [
        "input_ids",
        "position_ids",
        "cos_table",
        "sin_table",
        "attention_mask",
        "block_tables",
        "slots",
        "kv_cache_idx",
        "token_offset",
        "placeholder",
        "seq_len",
        "logits_indices",
    ],
}
READ_INPUTS = {
    "prefill": {
        "input_ids": torch.int64,
        "position_ids": torch.int64,
        "cos_table": torch.float32,
        "sin_table": torch.float32,
        "slots": torch.int32,
        "seq_len": torch.int32,
        "logits_indices": torch.int64,
    },
    "decode": {
        "input_ids": torch.int64,
        "position_ids": torch.int64,
        "cos_table": torch.float32,
        "sin_table": torch.float32,
        "block_tables": torch.int32,
        "slots": torch.int32,
        "seq_len": torch.int32,
    },
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Steps this small gain nothing from more threads, and on a busy machine those wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def reference_model(seed: int = 0):
    return random_model(SHAPE, seed)


def new(name: str = "qwen_PAModel") -> torch.ScriptObject:
    return torch.classes.ModelTorch.ModelTorch(name)


def parameter_text(is_prefill: bool = True, layout: Layout = GENERATIONS["2024"], **changes) -> str:
    return json.dumps({**parameters(SHAPE, layout, torch.float32, is_prefill), **changes})


def make_runner(seed: int = 0, generation: str = "2024", **options) -> Runner:
    return Runner(SHAPE, reference_model(seed), layout=GENERATIONS[generation], seed=seed, **options)


def weights_of(made: torch.ScriptObject, seed: int = 0) -> list[torch.Tensor]:
    return weight_list(json.loads(made.weight_spec()), reference_model(seed), Layout(), torch.float32)


def new_caches(fill: float = float("nan"), **changes) -> list[torch.Tensor]:
    options = {"blocks": 8, "block_size": 16, "kv_heads": SHAPE.kv_heads, "head_size": SHAPE.head_size}
    return [torch.full(tuple({**options, **changes}.values()), fill) for _ in range(SHAPE.layers)]


def bits(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies that compare equal where they hold the same bits, NaN included."""
    return [tensor.view(torch.int32).clone() for tensor in tensors]


def same_bits(tensors: list[torch.Tensor], before: list[torch.Tensor]) -> bool:
    return all(torch.equal(tensor.view(torch.int32), old) for tensor, old in zip(tensors, before, strict=True))


class Prefill:
    """A prefill object with weights and caches, and one step that it can run again and again."""

    def __init__(self) -> None:
        runner = make_runner()
        self.made, self.caches = runner.encoder, runner.caches
        self.step = runner.prefill_inputs(PROMPTS)

    def logits(self) -> torch.Tensor:
        return self.made.execute(*self.step)[0]


# --------------------------------------------------------------------------------------------------
# Names and order


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


def test_weights_and_caches_may_come_in_either_order_and_again():
    runner = make_runner()
    step = runner.prefill_inputs(PROMPTS)
    expected = runner.encoder.execute(*step)[0]
    for order in itertools.permutations(["weights", "caches", "weights", "caches"]):
        made = new()
        made.set_param(parameter_text())
        for call in order:
            if call == "weights":
                made.set_weight(weights_of(made))
            else:
                made.set_kv_cache(runner.caches[0::2], runner.caches[1::2])
        assert torch.equal(made.execute(*step)[0], expected)


# --------------------------------------------------------------------------------------------------
# Replacement


def test_set_param_again_replaces_the_model_and_asks_for_weights_and_caches_again():
    prefill = Prefill()
    prefill.logits()
    prefill.made.set_param(parameter_text(numHiddenLayers=1, packQuantType=[], linearQuantType=[],
                                          linearTransposeType=[]))  # fmt: skip
    assert prefill.made.progress() == 0.0
    assert prefill.made.counters()["executions"] == 0
    with pytest.raises(RuntimeError, match="set_weight"):
        prefill.logits()
    one_layer = Shape(layers=1)
    other = Runner(one_layer, random_model(one_layer))
    spec = [entry for entry in json.loads(prefill.made.weight_spec()) if "bias" not in entry["name"]]
    assert max(entry["slot"] for entry in spec) == 52
    prefill.made.set_weight(weight_list(json.loads(other.encoder.weight_spec()), other.model, Layout(),
                                        torch.float32))  # fmt: skip
    with pytest.raises(RuntimeError, match="set_kv_cache"):
        prefill.logits()
    prefill.made.set_kv_cache(other.caches[0::2], other.caches[1::2])
    step = other.prefill_inputs(PROMPTS)
    assert torch.equal(prefill.made.execute(*step)[0], other.encoder.execute(*step)[0])


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
def test_a_failed_set_param_leaves_the_old_model_whole(text):
    prefill = Prefill()
    before, spec, graph = prefill.logits(), prefill.made.weight_spec(), prefill.made.graph()
    counters = dict(prefill.made.counters())
    with pytest.raises((ValueError, NotImplementedError), match="set_param"):
        prefill.made.set_param(text)
    assert prefill.made.progress() == 1.0
    assert (prefill.made.weight_spec(), prefill.made.graph()) == (spec, graph)
    assert dict(prefill.made.counters()) == counters
    assert torch.equal(prefill.logits(), before)
    assert prefill.made.counters()["plans_built"] == counters["plans_built"]


def test_set_weight_again_replaces_every_weight():
    runner = make_runner()
    step = runner.prefill_inputs(PROMPTS)
    first = runner.encoder.execute(*step)[0]
    runner.encoder.set_weight(weights_of(runner.encoder, seed=1))
    second = runner.encoder.execute(*step)[0]
    assert not torch.equal(first, second)
    fresh = make_runner(seed=1)
    fresh.encoder.set_kv_cache(runner.caches[0::2], runner.caches[1::2])
    assert torch.equal(second, fresh.encoder.execute(*step)[0])


@pytest.mark.parametrize("change", [-1, 1, "none"])
def test_a_weight_list_of_the_wrong_length_is_refused_and_the_old_weights_stay(change):
    prefill = Prefill()
    before = prefill.logits()
    weights = weights_of(prefill.made, seed=1)
    count = len(weights)
    wrong = {-1: weights[:-1], 1: [*weights, weights[-1]], "none": []}[change]
    with pytest.raises(ValueError, match=rf"set_weight.*\b{count}\b.*\b{len(wrong)}\b"):
        prefill.made.set_weight(wrong)
    assert torch.equal(prefill.logits(), before)


def _shape_text(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


FAULTY_WEIGHTS = {
    "bfloat16": lambda weight: weight.bfloat16(),
    "float64": lambda weight: weight.double(),
    "int8": lambda weight: weight.to(torch.int8),
    "one row more": lambda weight: torch.cat([weight, weight[:2]]),
    "one dimension more": lambda weight: weight[None],
    "a placeholder": lambda weight: torch.ones(1),
    "nothing in it": lambda weight: weight[:0],
    "meta": lambda weight: weight.to("meta"),
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


@pytest.mark.parametrize("fault", FAULTY_WEIGHTS)
@pytest.mark.parametrize("name", FAULTY_SLOTS)
def test_one_faulty_weight_is_named_and_the_old_weights_stay(name, fault):
    prefill = Prefill()
    before = prefill.logits()
    slots = {entry["name"]: entry["slot"] for entry in json.loads(prefill.made.weight_spec())}
    weights = weights_of(prefill.made, seed=1)
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
    elif fault == "meta":
        assert "cpu" in message
    elif fault in {"one dimension more", "a placeholder"}:
        assert _shape_text(wrong) in message.split("got")[1]
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


def test_weights_on_a_device_without_kernels_are_refused_and_the_old_ones_stay():
    prefill = Prefill()
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
    "one meta": FaultyCaches(_replace(3, lambda t: t.to("meta")), ("value cache 1", "cpu")),
    "all meta": FaultyCaches(_replace_all(lambda t: t.to("meta")), ("cache", "cpu")),
    "strided": FaultyCaches(_replace(0, lambda t: t.repeat(2, 1, 1, 1)[::2]), ("key cache 0", "contiguous")),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTY_CACHES)
def test_faulty_caches_are_named_and_the_old_caches_stay(fault):
    prefill = Prefill()
    before = prefill.logits()
    keys, values = new_caches(), new_caches()
    FAULTY_CACHES[fault].change(keys, values)
    with pytest.raises(ValueError, match="set_kv_cache") as error:
        prefill.made.set_kv_cache(keys, values)
    for text in FAULTY_CACHES[fault].mentions:
        assert text in str(error.value)
    for cache_tensor in prefill.caches:
        cache_tensor.fill_(float("nan"))
    assert torch.equal(prefill.logits(), before)
    assert not all(cache_tensor.isnan().all() for cache_tensor in prefill.caches), "the old caches are in use"


@pytest.mark.parametrize("make", [lambda t: t.bfloat16(), lambda t: t.to("meta")], ids=["dtype", "device"])
def test_caches_that_do_not_go_with_the_weights_are_refused_when_both_are_known(make):
    made = new()
    made.set_param(parameter_text())
    with pytest.raises(ValueError, match="cache"):  # either call may see it
        made.set_kv_cache([make(t) for t in new_caches()], [make(t) for t in new_caches()])
        made.set_weight(weights_of(made))
    made.set_kv_cache(new_caches(), new_caches())
    made.set_weight(weights_of(made))
    step = make_runner().prefill_inputs(PROMPTS)
    step[0][6] = torch.arange(5, dtype=torch.int32)
    assert torch.equal(made.execute(*step)[0], Prefill().logits())


# --------------------------------------------------------------------------------------------------
# What the object keeps


def test_weights_and_caches_live_as_long_as_the_object_needs_them():
    runner = make_runner()
    step = runner.prefill_inputs(PROMPTS)
    expected = runner.encoder.execute(*step)[0]

    made = new()
    made.set_param(parameter_text())
    # clone(): nobody else may hold the memory.
    weights = [weight.clone() for weight in weights_of(made)]
    caches = [tensor.clone() for tensor in runner.caches]
    made.set_weight(weights)
    made.set_kv_cache(caches[0::2], caches[1::2])
    sizes = [tensor.shape for tensor in (*weights, *caches)]
    del weights, caches
    gc.collect()
    junk = [torch.full(size, 1e9) for size in sizes for _ in range(3)]
    assert torch.equal(made.execute(*step)[0], expected)
    del junk


def _watched(shape: tuple[int, ...]) -> tuple[torch.Tensor, weakref.ref]:
    """A tensor and a weak reference to the memory under it."""
    numpy = pytest.importorskip("numpy")
    array = numpy.zeros(shape, dtype=numpy.float32)
    return torch.from_numpy(array), weakref.ref(array)


@pytest.mark.parametrize("how", ["set_kv_cache again", "set_param again", "the object dies"])
def test_caches_are_given_back_when_they_are_no_longer_needed(how):
    prefill = Prefill()
    tensor, memory = _watched((8, 16, SHAPE.kv_heads, SHAPE.head_size))
    prefill.made.set_kv_cache([tensor, *new_caches()[1:]], new_caches())
    del tensor
    gc.collect()
    assert memory() is not None, "the object must hold its caches"
    if how == "set_kv_cache again":
        prefill.made.set_kv_cache(new_caches(), new_caches())
    elif how == "set_param again":
        prefill.made.set_param(parameter_text())
    else:
        prefill.made = None
    gc.collect()
    assert memory() is None


@pytest.mark.parametrize("how", ["set_weight again", "set_param again", "the object dies"])
def test_weights_are_given_back_when_they_are_no_longer_needed(how):
    prefill = Prefill()
    weights = weights_of(prefill.made)
    watched, memory = _watched(tuple(weights[-1].shape))
    prefill.made.set_weight([*weights[:-1], watched])
    del watched
    assert torch.equal(prefill.logits(), torch.zeros(5, SHAPE.vocab))
    if how == "set_weight again":
        prefill.made.set_weight(weights)
    elif how == "set_param again":
        prefill.made.set_param(parameter_text())
    else:
        prefill.made = None
    gc.collect()
    assert memory() is None


STRIDED = {
    "transposed": lambda weight: weight.t().contiguous().t() if weight.dim() == 2 else weight,
    "with gaps": lambda weight: torch.stack([weight, weight + 1], dim=-1)[..., 0],
    "a part of a larger tensor": lambda weight: torch.cat([weight + 1, weight], dim=-1)[..., weight.shape[-1] :],
}


@pytest.mark.parametrize("kind", STRIDED)
def test_weights_that_are_not_contiguous_give_the_same_logits(kind):
    prefill = Prefill()
    before = prefill.logits()
    strided = [STRIDED[kind](weight) for weight in weights_of(prefill.made)]
    assert not all(weight.is_contiguous() for weight in strided)
    prefill.made.set_weight(strided)
    sizes = [weight.shape for weight in strided]
    del strided
    gc.collect()
    junk = [torch.full(size, 1e9) for size in sizes for _ in range(3)]
    assert torch.equal(prefill.logits(), before)
    del junk


def test_weights_that_require_gradients_record_nothing():
    prefill = Prefill()
    before = prefill.logits()
    prefill.made.set_weight([torch.nn.Parameter(weight) for weight in weights_of(prefill.made)])
    after = prefill.logits()
    assert torch.equal(before, after)
    assert not after.requires_grad
    with torch.inference_mode():
        assert torch.equal(prefill.logits(), before)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "a default device": lambda: torch.device("meta"),
    "gradients": torch.enable_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_the_state_of_torch_around_a_call_changes_nothing(surroundings):
    runner = make_runner()
    step = runner.prefill_inputs([list(range(40)), [1, 2, 3]])
    expected = runner.encoder.execute(*step)[0]
    with SURROUNDINGS[surroundings]():
        logits = runner.encoder.execute(*step)[0]
    assert (logits.dtype, logits.device) == (expected.dtype, expected.device)
    assert torch.equal(logits, expected)


# --------------------------------------------------------------------------------------------------
# Bad inputs


@dataclass
class Call:
    """One call that can be spoilt: tensors by name, and the parameters."""

    tensors: dict[str, torch.Tensor]
    parameters: object
    extra: list[torch.Tensor] = field(default_factory=list)

    def arguments(self) -> tuple[list[torch.Tensor], str]:
        text = self.parameters if isinstance(self.parameters, str) else json.dumps(self.parameters)
        return [*self.tensors.values(), *self.extra], text


class Target:
    """An object in one phase and generation, with a good call whose cache rows are not written yet."""

    def __init__(self, phase: str, generation: str) -> None:
        self.phase, self.generation = phase, generation
        self.runner = make_runner(generation=generation)
        self.made = self.runner.encoder if phase == "prefill" else self.runner.decoder
        inputs, text = self.runner.prefill_inputs(PROMPTS, indices=[4, 2])
        if phase == "decode":
            self.runner.encoder.execute(inputs, text)
            inputs, text = self.runner.decode_inputs({0: 6, 1: 7})
        self.inputs, self.parameters = inputs, json.loads(text)
        self.caches_before = [tensor.clone() for tensor in self.runner.caches]
        self.expected = self.run()

    def call(self) -> Call:
        names = INPUT_NAMES[self.generation]
        tensors = dict(zip(names, self.inputs, strict=True))
        return Call(tensors, json.loads(json.dumps(self.parameters)))

    def run(self, call: Call | None = None) -> torch.Tensor:
        """The good step, or another one; afterwards the caches are as before it."""
        result = self.made.execute(*(call or self.call()).arguments())
        assert len(result) == 1
        self.restore()
        return result[0]

    def restore(self) -> None:
        for tensor, before in zip(self.runner.caches, self.caches_before, strict=True):
            tensor.copy_(before)

    def check_refused(self, call: Call, error: type[Exception], mentions: tuple[str, ...]) -> None:
        """The call raises `error` naming `mentions`, writes nothing, and the object works on as before."""
        self.restore()
        before = bits(self.caches_before)
        executions = self.made.counters()["executions"]
        inputs, text = call.arguments()
        with pytest.raises(error) as caught:
            self.made.execute(inputs, text)
        assert type(caught.value) is error
        for mention in ("execute", *mentions):
            assert mention in str(caught.value)
        out = torch.full_like(self.expected, 7.0)
        with pytest.raises(error):
            self.made.execute_out(inputs, [out], text)
        assert (out == 7.0).all()
        assert same_bits(self.runner.caches, before)
        assert self.made.counters()["executions"] == executions
        assert torch.equal(self.run(), self.expected)


@cache
def target(phase: str, generation: str = "2024") -> Target:
    return Target(phase, generation)


both_phases = pytest.mark.parametrize("phase", PHASES)
both_generations = pytest.mark.parametrize("generation", GENERATIONS)
read_inputs = pytest.mark.parametrize(
    ("phase", "name"), [(phase, name) for phase in PHASES for name in READ_INPUTS[phase]]
)


@both_generations
@both_phases
@pytest.mark.parametrize("count", [0, 1, 11, 13, 24])
def test_a_wrong_number_of_inputs_is_refused(phase, generation, count):
    call = target(phase, generation).call()
    tensors = list(call.tensors.items())
    call.tensors = dict(tensors[:count])
    call.extra = [torch.zeros(1)] * (count - 12)
    target(phase, generation).check_refused(call, ValueError, ("12 inputs", f"got {count}"))


OTHER_DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.bool,
]


@pytest.mark.parametrize(
    ("phase", "name", "dtype"),
    [
        (phase, name, dtype)
        for phase in PHASES
        for name, expected in READ_INPUTS[phase].items()
        for dtype in OTHER_DTYPES
        if dtype != expected
    ],
    ids=str,
)
def test_an_input_of_another_dtype_is_refused_by_name(phase, name, dtype):
    call = target(phase).call()
    call.tensors[name] = call.tensors[name].to(dtype)
    kinds = [READ_INPUTS[phase][name], dtype]
    texts = [str(kind).removeprefix("torch.") for kind in kinds if kind not in {torch.float64, torch.int16}]
    target(phase).check_refused(call, ValueError, (name, *texts))


@both_generations
@read_inputs
def test_an_input_on_another_device_is_refused_by_name(phase, name, generation):
    call = target(phase, generation).call()
    call.tensors[name] = call.tensors[name].to("meta")
    target(phase, generation).check_refused(call, ValueError, (name, "cpu"))


@read_inputs
def test_an_input_that_is_not_contiguous_is_refused_by_name(phase, name):
    call = target(phase).call()
    good = call.tensors[name]
    strided = torch.stack([good, good], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    call.tensors[name] = strided
    target(phase).check_refused(call, ValueError, (name, "contiguous"))


@both_generations
@read_inputs
def test_an_input_of_another_rank_is_refused_by_name(phase, name, generation):
    for change in (lambda t: t[None], lambda t: t[..., None], lambda t: t.reshape(-1)[0]):
        call = target(phase, generation).call()
        call.tensors[name] = change(call.tensors[name]).contiguous()
        target(phase, generation).check_refused(call, ValueError, (name,))


def _resized(tensor: torch.Tensor, axis: int, change: int) -> torch.Tensor:
    size = tensor.shape[axis] + change
    return torch.cat([tensor, tensor], dim=axis).narrow(axis, 0, size).contiguous()


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize(
    ("phase", "name", "axis", "mention"),
    [
        # The positions are compared with the ids: the message names either.
        *[(phase, "input_ids", 0, "position_ids") for phase in PHASES],
        *[(phase, "position_ids", 0, "position_ids") for phase in PHASES],
        *[(phase, "slots", 0, "slots") for phase in PHASES],
        *[(phase, "seq_len", 0, "seq_len") for phase in PHASES],
        *[(phase, "cos_table", 1, "cos_table") for phase in PHASES],
        *[(phase, "sin_table", 1, "sin_table") for phase in PHASES],
        *[(phase, "sin_table", 0, "sin_table") for phase in PHASES],
        ("decode", "block_tables", 0, "block_tables"),
        ("prefill", "attention_mask", 0, "attention_mask"),
    ],
)
def test_an_input_of_another_size_is_refused_by_name(phase, name, axis, mention, change):
    call = target(phase).call()
    if name == "attention_mask":
        call.tensors[name] = torch.zeros(4, 4)
    wrong = call.tensors[name] = _resized(call.tensors[name], axis, change)
    mentions = (mention,) if name == "input_ids" else (mention, _shape_text(wrong))
    target(phase).check_refused(call, ValueError, mentions)


OUT_OF_RANGE = [
    ("prefill", "input_ids", -1),
    ("prefill", "input_ids", SHAPE.vocab),
    ("prefill", "input_ids", 2**40),
    ("prefill", "position_ids", -1),
    ("prefill", "position_ids", SHAPE.max_positions),
    ("prefill", "slots", -2),
    ("prefill", "slots", 64 * 16),
    ("prefill", "logits_indices", -1),
    ("prefill", "logits_indices", 5),
    ("prefill", "logits_indices", -(2**63)),
    ("decode", "input_ids", -1),
    ("decode", "input_ids", SHAPE.vocab),
    ("decode", "position_ids", -(2**63)),
    ("decode", "position_ids", SHAPE.max_positions),
    ("decode", "slots", -2),
    ("decode", "slots", -(2**31)),
    ("decode", "slots", 64 * 16),
    ("decode", "block_tables", -1),
    ("decode", "block_tables", 64),
    ("decode", "block_tables", 2**31 - 1),
]


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize(("phase", "name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_name(phase, name, value, place):
    call = target(phase).call()
    wrong = call.tensors[name] = call.tensors[name].clone()
    wrong.view(-1)[place] = value
    target(phase).check_refused(call, ValueError, (name, str(value)))


@pytest.mark.parametrize(("phase", "name"), [(phase, name) for phase in PHASES for name in ["slots"]])
def test_the_slot_minus_one_is_not_out_of_range(phase, name):
    call = target(phase).call()
    call.tensors[name] = torch.full_like(call.tensors[name], -1)
    aim = target(phase)
    aim.made.execute(*call.arguments())
    assert same_bits(aim.runner.caches, bits(aim.caches_before))


def test_entries_of_the_block_tables_beyond_the_context_are_never_read():
    aim = target("decode")
    call = aim.call()
    used = call.tensors["block_tables"]
    beyond = torch.tensor([[-5, 2**31 - 1]] * used.shape[0], dtype=torch.int32)
    call.tensors["block_tables"] = torch.cat([used, beyond], dim=1)
    assert torch.equal(aim.run(call), aim.expected)


def test_a_context_that_does_not_fit_its_block_table_is_refused():
    aim = target("decode")
    call = aim.call()
    capacity = call.tensors["block_tables"].shape[1] * aim.runner.block_size
    call.parameters["seqLen"][1] = capacity + 1
    call.tensors["seq_len"] = torch.tensor(call.parameters["seqLen"], dtype=torch.int32)
    aim.check_refused(call, ValueError, ("block_tables", str(capacity + 1)))


@both_phases
@pytest.mark.parametrize(
    ("lengths", "mention"),
    [
        pytest.param(None, "seqLen", id="missing"),
        pytest.param("3,2", "seqLen", id="a string"),
        pytest.param({}, "seqLen", id="an object"),
        pytest.param(5, "seqLen", id="a number"),
        pytest.param([], "seq_len", id="empty"),
        pytest.param([3], "seq_len", id="too few"),
        pytest.param([3, 2, 1], "seq_len", id="too many"),
        pytest.param([3, 0], "seqLen", id="zero"),
        pytest.param([5, 0], "seqLen", id="zero with the right sum"),
        pytest.param([3, -2], "seqLen", id="negative"),
        pytest.param([3, 2.0], "seqLen", id="a float"),
        pytest.param([3, True], "seqLen", id="a boolean"),
        pytest.param([3, "2"], "seqLen", id="a string inside"),
        pytest.param([3, None], "seqLen", id="null inside"),
        pytest.param([3, [2]], "seqLen", id="a list inside"),
        pytest.param([3, 2**31], "seqLen", id="beyond int32"),
        pytest.param([3, 2**63], "seqLen", id="beyond int64"),
        pytest.param([3, 2**32 + 2], "seqLen", id="right modulo 2^32"),
        pytest.param([2, 3], "seq_len", id="unlike the tensor"),
        pytest.param([1, 4], "seq_len", id="right sum, unlike the tensor"),
    ],
)
def test_a_wrong_seqLen_is_refused(phase, lengths, mention):
    call = target(phase).call()
    if phase == "decode" and isinstance(lengths, list):
        longer = [n + 1 if type(n) is int and 0 < n < 2**31 - 1 else n for n in lengths]
        lengths = longer
    call.parameters = {} if lengths is None else {"seqLen": lengths}
    target(phase).check_refused(call, ValueError, (mention,))


@both_phases
def test_a_length_of_zero_is_refused_even_if_tensor_and_parameters_agree(phase):
    call = target(phase).call()
    call.parameters = {"seqLen": [sum(call.parameters["seqLen"]), 0]}
    call.tensors["seq_len"] = torch.tensor(call.parameters["seqLen"], dtype=torch.int32)
    target(phase).check_refused(call, ValueError, ("seqLen", "0"))


def test_lengths_that_do_not_add_up_to_the_tokens_are_refused_in_prefill():
    call = target("prefill").call()
    call.parameters = {"seqLen": [3, 3]}
    call.tensors["seq_len"] = torch.tensor([3, 3], dtype=torch.int32)
    target("prefill").check_refused(call, ValueError, ("seqLen", "input_ids", "5", "6"))


def test_a_decode_step_with_more_tokens_than_sequences_is_refused():
    call = target("decode").call()
    for name in ("input_ids", "position_ids", "slots"):
        call.tensors[name] = call.tensors[name].repeat(2)
    target("decode").check_refused(call, ValueError, ("seqLen", "input_ids"))


@both_phases
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "nonsense",
        "null",
        "5",
        "[]",
        '["seqLen"]',
        '{"seqLen": [3, 2]',
        '{"seqLen": [3, 2]} x',
        "{'seqLen': [3, 2]}",
        '{"seqLen": [3, 2], }',
        '{"seqLen": [3, NaN]}',
        '{"seqLen": [3, 2], "x": "' + "y" * 200_001 + '"}',
        "[" * 100_000,
        '{"x":' * 10_000,
    ],
    ids=lambda text: repr(text[:24]),
)
def test_text_that_is_not_a_JSON_object_is_refused(phase, text):
    call = target(phase).call()
    call.parameters = text
    target(phase).check_refused(call, ValueError, ("parameter of execute",))


@both_phases
def test_chunked_prefill_is_refused_as_not_built(phase):
    call = target(phase).call()
    call.parameters["qLen"] = [1, 1]
    target(phase).check_refused(call, NotImplementedError, ("qLen",))


@both_phases
@both_generations
def test_a_list_in_the_order_of_the_other_generation_is_told_with_the_name_to_use(phase, generation):
    other = {"2024": "current", "current": "2024"}[generation]
    call = target(phase, generation).call()
    call.tensors = {name: call.tensors[name] for name in INPUT_NAMES[other]}
    names = {"2024": "qwen_QwenDecoderModel", "current": "qwen_DecoderModel"}
    target(phase, generation).check_refused(call, ValueError, ("seq_len", "order", names[generation]))
    # The named model takes that very list.
    taker = target(phase, other)
    assert torch.equal(taker.run(call), taker.expected)


DOORS = {
    "weight": lambda aim, spoil: aim.made.set_weight([spoil(weights_of(aim.made)[0]), *weights_of(aim.made)[1:]]),
    "cache": lambda aim, spoil: aim.made.set_kv_cache(new_caches(), [spoil(new_caches()[0]), *new_caches()[1:]]),
    "input": lambda aim, spoil: aim.made.execute([spoil(aim.inputs[0]), *aim.inputs[1:]], json.dumps(aim.parameters)),
    "output": lambda aim, spoil: aim.made.execute_out(
        aim.inputs, [spoil(torch.empty_like(aim.expected))], json.dumps(aim.parameters)
    ),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("spoil", "given"),
    [
        pytest.param(lambda t: t.double(), "float64", id="float64"),
        pytest.param(lambda t: t.to("meta"), "meta", id="meta"),
    ],
)
def test_the_message_names_a_dtype_or_device_that_no_kernel_knows(door, spoil, given):
    with pytest.raises(ValueError, match="must") as error:
        DOORS[door](target("prefill"), spoil)
    assert given in str(error.value).lower()


def test_hundreds_of_bad_calls_leave_no_trace():
    aim = target("prefill")
    plans = aim.made.counters()["plans_built"]
    for round_number in range(300):
        call = aim.call()
        name = list(READ_INPUTS["prefill"])[round_number % len(READ_INPUTS["prefill"])]
        call.tensors[name] = call.tensors[name].to(torch.float64)
        with pytest.raises(ValueError, match=name):
            aim.made.execute(*call.arguments())
    assert torch.equal(aim.run(), aim.expected)
    assert aim.made.counters()["plans_built"] == plans


# --------------------------------------------------------------------------------------------------
# Outputs


@both_phases
@both_generations
def test_execute_out_writes_what_execute_returns(phase, generation):
    aim = target(phase, generation)
    out = torch.full_like(aim.expected, float("nan"))
    inputs, text = aim.call().arguments()
    assert aim.made.execute_out(inputs, [out], text) == 0
    aim.restore()
    assert torch.equal(out, aim.expected)


FAULTY_OUTPUTS = {
    "none": (lambda out: [], ("1 output", "got 0")),
    "two": (lambda out: [out, out.clone()], ("1 output", "got 2")),
    "one row more": (lambda out: [torch.cat([out, out[:1]])], ("output 0", f"[3, {SHAPE.vocab}]")),
    "one row less": (lambda out: [out[:1]], ("output 0", f"[1, {SHAPE.vocab}]")),
    "one column less": (lambda out: [out[:, 1:].contiguous()], ("output 0", f"[2, {SHAPE.vocab - 1}]")),
    "flat": (lambda out: [out.view(-1)], ("output 0", f"[{2 * SHAPE.vocab}]")),
    "rank 3": (lambda out: [out[None]], ("output 0", f"[1, 2, {SHAPE.vocab}]")),
    "bfloat16": (lambda out: [out.bfloat16()], ("output 0", "float32", "bfloat16")),
    "float64": (lambda out: [out.double()], ("output 0", "float32")),
    "int32": (lambda out: [out.int()], ("output 0", "float32", "int32")),
    "meta": (lambda out: [out.to("meta")], ("output 0", "cpu")),
    "transposed": (lambda out: [out.t().contiguous().t()], ("output 0", "contiguous")),
    "with gaps": (lambda out: [torch.stack([out, out], -1)[..., 0]], ("output 0", "contiguous")),
    "expanded": (lambda out: [out[:1].expand(2, -1)], ("output 0", "contiguous")),
}


@both_phases
@pytest.mark.parametrize("fault", FAULTY_OUTPUTS)
def test_execute_out_refuses_tensors_that_cannot_take_the_logits(phase, fault):
    aim = target(phase)
    make, mentions = FAULTY_OUTPUTS[fault]
    outputs = make(torch.full_like(aim.expected, 7.0))
    inputs, text = aim.call().arguments()
    with pytest.raises(ValueError, match="execute_out") as error:
        aim.made.execute_out(inputs, outputs, text)
    for mention in mentions:
        assert mention in str(error.value)
    for out in outputs:
        assert out.is_meta or (out == 7).all()
    assert same_bits(aim.runner.caches, bits(aim.caches_before))
    assert torch.equal(aim.run(), aim.expected)


def test_execute_returns_fresh_contiguous_tensors():
    prefill = Prefill()
    first, second = prefill.logits(), prefill.logits()
    assert first.is_contiguous()
    assert first.data_ptr() != second.data_ptr()
    kept = first.clone()
    second.fill_(0)
    prefill.logits()
    assert torch.equal(first, kept)


@both_phases
@both_generations
def test_execute_never_returns_an_empty_list(phase, generation):
    aim = target(phase, generation)
    call = aim.call()
    for name in ("input_ids", "position_ids", "slots", "seq_len", "logits_indices"):
        call.tensors[name] = call.tensors[name][:0]
    call.tensors["block_tables"] = call.tensors["block_tables"][:0]
    call.parameters = {"seqLen": []}
    (logits,) = aim.made.execute(*call.arguments())
    assert logits.shape == (0, SHAPE.vocab)
    assert aim.made.execute_out(call.arguments()[0], [logits], call.arguments()[1]) == 0
    assert torch.equal(aim.run(), aim.expected)


def test_a_prefill_without_logits_rows_still_fills_the_cache():
    aim = target("prefill")
    call = aim.call()
    call.tensors["logits_indices"] = torch.zeros(0, dtype=torch.int64)
    (logits,) = aim.made.execute(*call.arguments())
    assert logits.shape == (0, SHAPE.vocab)
    rows = call.tensors["slots"].long()
    for tensor in aim.runner.caches:
        assert torch.isfinite(tensor.view(-1, SHAPE.kv_heads, SHAPE.head_size)[rows]).all()
    aim.run()


# --------------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_cache_rows_that_were_never_written_are_never_read(poison):
    aim = Target("decode", "2024")
    assert not aim.runner.caches[0].isnan().all(), "the caches must have rows of both kinds"
    for tensor in aim.runner.caches:
        unwritten = tensor.isnan()
        assert unwritten.any()
        tensor[unwritten] = poison
    (logits,) = aim.made.execute(*aim.call().arguments())
    assert torch.equal(logits, aim.expected)


@both_phases
def test_a_step_writes_the_rows_of_its_slots_and_no_others(phase):
    aim = Target(phase, "2024")
    call = aim.call()
    aim.made.execute(*call.arguments())
    slots = call.tensors["slots"].long()
    for tensor, before in zip(aim.runner.caches, aim.caches_before, strict=True):
        rows = tensor.view(-1, SHAPE.kv_heads * SHAPE.head_size)
        old = before.view(-1, SHAPE.kv_heads * SHAPE.head_size)
        assert torch.isfinite(rows[slots]).all()
        others = torch.ones(len(rows), dtype=torch.bool)
        others[slots] = False
        assert torch.equal(rows[others].view(torch.int32), old[others].view(torch.int32))


# --------------------------------------------------------------------------------------------------
# The extras


def test_progress_is_zero_before_the_weights_and_one_after():
    made = new()
    assert made.progress() == 0.0
    made.set_param(parameter_text())
    assert made.progress() == 0.0
    made.set_weight(weights_of(made))
    assert made.progress() == 1.0
    made.set_kv_cache(new_caches(), new_caches())
    assert made.progress() == 1.0
    made.set_param(parameter_text())
    assert made.progress() == 0.0


def test_counters_count_what_the_object_does():
    prefill = Prefill()
    documented = {
        "executions",
        "shape_inferences",
        "kernel_setups",
        "plans",
        "plans_built",
        "plans_evicted",
        "arena_allocations",
        "arena_bytes",
    }
    before = dict(prefill.made.counters())
    assert documented <= set(before)
    assert set(before.values()) == {0}
    prefill.logits()
    after = dict(prefill.made.counters())
    assert after["executions"] == after["plans"] == after["plans_built"] == after["arena_allocations"] == 1
    assert after["shape_inferences"] == after["kernel_setups"] > SHAPE.layers
    assert after["arena_bytes"] > 0
    prefill.logits()
    assert dict(prefill.made.counters()) == {**after, "executions": 2}


@both_generations
def test_graph_prints_nodes_tensors_shapes_and_the_memory_plan(generation):
    runner = make_runner(generation=generation)
    made = runner.encoder
    before = made.graph()
    assert "no step has run" in before
    runner.prefill(PROMPTS)
    text = made.graph()
    for line in before.splitlines()[1:]:
        node, operation = line.split(" = ")
        assert f"{node} = {operation}(" in text
    for entry in json.loads(made.weight_spec()):
        assert entry["name"] in text
    # Five tokens run in the bucket of eight.
    assert f"input_ids int64[8]) -> embedding float32[8, {SHAPE.hidden}]" in text
    assert f"logits float32[8, {SHAPE.vocab}]" in text
    for layer in range(SHAPE.layers):
        assert f"layers.{layer}.k_cache float32[64, 16, {SHAPE.kv_heads}, {SHAPE.head_size}]" in text
    plan = re.findall(r"^  (\d+) \+ (\d+)  (\S+)$", text, re.MULTILINE)
    arena = made.counters()["arena_bytes"]
    assert max(int(offset) + int(size) for offset, size, _ in plan) <= arena
    assert sum(int(size) for _, size, _ in plan) > arena, "tensors whose lives do not meet share memory"
    for name in ("embedding", "layers.0.attn.qkv", f"layers.{SHAPE.layers - 1}.mlp.swiglu"):
        assert name in {row[2] for row in plan}


LAYER_SLOTS = {
    "attn.norm.weight": 0,
    "attn.q.weight": 4,
    "attn.q.bias": 5,
    "attn.k.weight": 10,
    "attn.k.bias": 11,
    "attn.v.weight": 16,
    "attn.v.bias": 17,
    "attn.o.weight": 22,
    "mlp.norm.weight": 28,
    "mlp.gate.weight": 32,
    "mlp.up.weight": 38,
    "mlp.down.weight": 44,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both_generations
def test_weight_spec_describes_every_slot_in_use(generation, dtype):
    layout = GENERATIONS[generation]
    made = new(layout.model_name)
    made.set_param(json.dumps(parameters(SHAPE, layout, dtype, True)))
    spec = json.loads(made.weight_spec())
    last = 50 * SHAPE.layers
    expected = {"embedding.weight": 0, "final_norm.weight": last + 1, "lm_head.weight": last + 2}
    for layer in range(SHAPE.layers):
        for name, slot in LAYER_SLOTS.items():
            expected[f"layers.{layer}.{name}"] = 1 + 50 * layer + slot
    assert {entry["name"]: entry["slot"] for entry in spec} == expected
    assert [entry["slot"] for entry in spec] == sorted(entry["slot"] for entry in spec)
    weights = weight_list(spec, reference_model(), layout, dtype)
    sizes = {
        "hidden": SHAPE.hidden,
        "vocab": SHAPE.vocab,
        "vocab or vocab + 1": SHAPE.vocab,
        "intermediate": SHAPE.intermediate,
    }
    for entry in spec:
        assert {"name", "slot", "shape", "dtype", "shard"} <= set(entry)
        assert [sizes.get(size, size) for size in entry["shape"]] == list(weights[entry["slot"]].shape)
        assert entry["dtype"] == ("bfloat16" if dtype == torch.bfloat16 else "float")
    shards = {entry["name"]: entry["shard"] for entry in spec}
    assert shards["layers.0.attn.q.weight"] == "heads"
    assert shards["layers.0.attn.k.weight"] == "kv_heads"
    assert shards["layers.0.attn.o.weight"] == shards["layers.0.mlp.down.weight"] == "columns"
    assert shards["layers.0.mlp.gate.weight"] == shards["lm_head.weight"] == "rows"
    assert shards["final_norm.weight"] == "none"
