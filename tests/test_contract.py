"""The two positional contracts: the keys of set_param, and whole callers of either generation (docs/contract.md)."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from reference import Layout, Runner, Shape, parameters, random_model, reference_logits, relative_error, tables
from transformers import Qwen2ForCausalLM

NAMES = {"2024": "qwen_PAModel", "current": "qwen_QwenDecoderModel"}
SHAPE = Shape()
BFLOAT16_FACTOR = 1.5
FLOAT32_TOLERANCE = 1e-4

both_generations = pytest.mark.parametrize("generation", NAMES)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Steps this small gain nothing from more threads, and on a busy machine those wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def reference_model(shape: Shape = SHAPE, seed: int = 0) -> Qwen2ForCausalLM:
    return random_model(shape, seed)


def new(name: str) -> torch.ScriptObject:
    return torch.classes.ModelTorch.ModelTorch(name)


def good_parameters(generation: str, is_prefill: bool = True) -> dict:
    return parameters(SHAPE, Layout(NAMES[generation]), torch.float32, is_prefill)


def set_param(generation: str, given: dict) -> torch.ScriptObject:
    """Sets the parameters; any warning is an error."""
    made = new(NAMES[generation])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.set_param(json.dumps(given)) == 0
    return made


# --------------------------------------------------------------------------------------------------
# Keys

REQUIRED_BY_BOTH = {
    "isFA": 0,
    "isPrefill": "true",
    "isBF16": None,
    "numHiddenLayers": 2.5,
    "numAttentionHeadsPerRank": "4",
    "numKeyValueHeadsPerRank": True,
    "hiddenSizePerAttentionHead": [16],
}
REQUIRED = {
    "2024": {**REQUIRED_BY_BOTH, "rmsNormEps": "1e-6"},
    "current": {
        **REQUIRED_BY_BOTH,
        "isUnpadInputs": 1,
        "normEps": False,
        "normType": "RMS",
        "lmHeadTransposeType": 0.5,
        "linearTransposeType": 1,
        "backend": 7,
        "rank": "0",
        "worldSize": None,
    },
}
required_keys = pytest.mark.parametrize(
    ("generation", "key"), [(generation, key) for generation, keys in REQUIRED.items() for key in keys]
)


@required_keys
def test_a_missing_required_key_is_named(generation, key):
    given = good_parameters(generation)
    del given[key]
    with pytest.raises(ValueError, match=rf"set_param.*\b{key}\b.*required"):
        set_param(generation, given)


@required_keys
def test_a_required_key_of_the_wrong_type_is_named(generation, key):
    given = {**good_parameters(generation), key: REQUIRED[generation][key]}
    with pytest.raises(ValueError, match=rf"set_param.*\b{key}\b must be"):
        set_param(generation, given)


@both_generations
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epsilon", 0.0),
        ("epsilon", -1e-6),
        ("epsilon", 1.0),
        ("numHiddenLayers", 0),
        ("numHiddenLayers", -1),
        ("numHiddenLayers", 1001),
        ("numHiddenLayers", 2**40),
        ("numHiddenLayers", 2**64 - 1),
        ("numAttentionHeadsPerRank", 0),
        ("numAttentionHeadsPerRank", 5),
        ("numKeyValueHeadsPerRank", 0),
        ("numKeyValueHeadsPerRank", 3),
        ("hiddenSizePerAttentionHead", 0),
        ("hiddenSizePerAttentionHead", 15),
        ("hiddenSizePerAttentionHead", 576),
        ("lmHeadTransposeType", 2),
        ("lmHeadTransposeType", -2),
        ("packQuantType", [[1, 1]]),
        ("packQuantType", [[1]] * 2),
        ("packQuantType", [[1, 27]] * 2),
        ("packQuantType", [[1, -1]] * 2),
        ("packQuantType", [1, 1]),
        ("linearTransposeType", [[1] * 7]),
        ("linearTransposeType", [[1] * 7] * 3),
        ("linearTransposeType", [[1] * 6] * 2),
        ("linearTransposeType", [[1] * 8] * 2),
        ("linearTransposeType", [[-2] * 7] * 2),
        ("linearTransposeType", [["1"] * 7] * 2),
        ("linearTransposeType", [[1.0] * 7] * 2),
        ("linearQuantType", [[0] * 7]),
        ("linearQuantType", [[-2] * 7] * 2),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named(generation, key, value):
    if key == "epsilon":
        key = {"2024": "rmsNormEps", "current": "normEps"}[generation]
    with pytest.raises(ValueError, match=rf"set_param.*\b{key}\b"):
        set_param(generation, {**good_parameters(generation), key: value})


@both_generations
@pytest.mark.parametrize(
    "text",
    ["", " ", "{", "[]", "null", "7", "nonsense", '{"isFA": }', "{}{}", '"' + "x" * 200_000 + '"', '{"x":' * 50_000],
    ids=lambda text: repr(text[:16]),
)
def test_text_that_is_not_a_JSON_object_is_refused(generation, text):
    with pytest.raises(ValueError, match=r"the parameter of set_param must"):
        new(NAMES[generation]).set_param(text)


FALSE_ONLY = {
    "2024": [
        *["isFA", "supportSpeculate", "supportPrefixCache", "enableSplitFuse", "supportLora", "loraEnableGMM"],
        *["kvQuant", "enableFA3", "enableLogN", "isLongSeq", "isYarn"],
    ],
    "current": [
        *["isFA", "enableKvQuant", "enableFA3", "enableReduceQuant", "enableRopeQuantKvcache"],
        *["enableSpeculate", "enableSplitFuse", "enablePrefixCache", "enableLora", "loraEnableGMM"],
        *["enableGreedySearchOpt", "enableCompressHead", "enableOmniAttention", "enableDap"],
        *["enableLogN", "isLongSeq", "isYarn", "useQKNorm", "enableModelConfuscation", "isEdgeHardware"],
        *["enableFlashComm", "hasPp", "hasAttnDp", "layerwiseDisaggregated", "reuseEmbedTable"],
        "outputEmbedTable",
    ],
}
NOT_BUILT = {
    "2024": [
        ("worldSize", 2, "2"),
        ("worldSize", 0, "0"),
        ("rank", 1, "1"),
        ("rank", -1, "-1"),
        ("linearQuantType", [[0] * 7, [0, 0, 0, 1, 0, 0, 0]], "1"),
        ("linearTransposeType", [[2] * 7] * 2, "2"),
    ],
    "current": [
        ("isUnpadInputs", False, "false"),
        ("normType", 1, "1"),
        ("worldSize", 8, "8"),
        ("rank", 3, "3"),
        ("positionEmbeddingType", 1, "1"),
        ("memPoolType", 2, "2"),
        ("tpWorldSize", 2, "2"),
        ("attnTpSize", 4, "4"),
        ("attnDpSize", 2, "2"),
        ("mlpTpSize", 2, "2"),
        ("weightQuantType", "w8a8", "w8a8"),
        ("weightQuantType", "w4a16", "w4a16"),
        ("linearQuantType", [[1] * 7] * 2, "1"),
        ("linearTransposeType", [[3] * 7] * 2, "3"),
        *[("linearDescs", [[-1] * 6 + [kind]] * 2, str(kind)) for kind in range(2, 12)],
        ("isAntiOutlier", [[False, False], [False, True]], "true"),
        ("mapping", {"worldSize": 1, "attnTp": {"rank": 0, "rankIds": [0, 1]}}, "attnTp"),
        ("mapping", {"attnTp": {"rankIds": [0]}, "lmHeadTp": {"rankIds": [0, 1, 2, 3]}}, "4"),
    ],
}


@pytest.mark.parametrize(
    ("generation", "key", "value", "shown"),
    [
        *[(generation, *row) for generation, rows in NOT_BUILT.items() for row in rows],
        *[(generation, key, True, "true") for generation, keys in FALSE_ONLY.items() for key in keys],
    ],
    ids=str,
)
def test_a_key_that_asks_for_something_not_built_is_named_with_its_value(generation, key, value, shown):
    name = {"2024": "qwen_DecoderModel", "current": "qwen_QwenDecoderModel"}[generation]
    given = {**good_parameters(generation), key: value}
    with pytest.raises(NotImplementedError, match=rf"set_param.*\b{key}\b.*{shown}.*not built"):
        new(name).set_param(json.dumps(given))


@pytest.mark.parametrize(
    ("generation", "key"), [(generation, key) for generation, keys in FALSE_ONLY.items() for key in keys]
)
def test_a_key_that_asks_for_nothing_is_accepted(generation, key):
    set_param(generation, {**good_parameters(generation), key: False})


VALUES = {
    "bool": ([True, False], "true"),
    "int": ([0, 7, -1, 2**40], 1.5),
    "number": ([0, 2.5, -1], "1.0"),
    "string": (["", "hccl", "a file.json"], 3),
    "array": ([[], [1, 2], [[1]]], {}),
}
MEANINGLESS = {
    "2024": {
        "bool": ["supportSwiGLU", "supportLcoc", "isEmbeddingParallel", "isLmHeadParallel", "enableQScale"],
        "int": ["quantGroupSize"],
        "number": ["mscale"],
        "string": ["backend", "rankTableFile"],
        "array": ["seqLen", "tokenOffset"],
    },
    "current": {
        "bool": [
            *["isEmbeddingParallel", "isLmHeadParallel", "enableSwiGLU", "enableSwigluQuant", "enableQScale"],
            *["enableLcoc", "enableMC2", "enableAddNorm", "enableIntraLayerAddNorm"],
            *["enableInterLayerAddNorm", "enablePreFetchWeight", "enableCVOverlap", "withEmbedding"],
        ],
        "int": [
            *["attnBackend", "matmulBackend", "ropeBackend", "quantGroupSize", "preFetchWeightSize"],
            *["modelConfuscationFd", "layerwiseMode", "startLayerId", "endLayerId", "ppGroupSize", "tpRank"],
        ],
        "number": ["mscale"],
        "string": ["backend", "rankTableFile", "tpRankTableFile", "tpDomain", "pipeKey"],
        "array": ["pattern_mask", "seqLen", "tokenOffset"],
    },
}
meaningless_keys = pytest.mark.parametrize(
    ("generation", "kind", "key"),
    [
        (generation, kind, key)
        for generation, kinds in MEANINGLESS.items()
        for kind, keys in kinds.items()
        for key in keys
    ],
)


@meaningless_keys
def test_a_meaningless_key_is_accepted_with_any_value_of_its_type_and_no_other(generation, kind, key):
    given = good_parameters(generation)
    values, wrong = VALUES[kind]
    for value in values:
        set_param(generation, {**given, key: value})
    with pytest.raises(ValueError, match=rf"\b{key}\b must be"):
        set_param(generation, {**given, key: wrong})


@both_generations
def test_meaningless_keys_change_no_logits(generation):
    runner = Runner(SHAPE, reference_model(), layout=Layout(NAMES[generation]))
    step = runner.prefill_inputs([[1, 2, 3], [4]])
    expected = runner.encoder.execute(*step)[0]
    weights = hand_made_weights(reference_model(), SHAPE, torch.float32, packed=[(False, False)] * 2)
    for pick in (0, -1):
        values = {key: VALUES[kind][0][pick] for kind, keys in MEANINGLESS[generation].items() for key in keys}
        made = set_param(generation, {**good_parameters(generation), **values})
        made.set_weight(weights)
        made.set_kv_cache(runner.caches[0::2], runner.caches[1::2])
        assert torch.equal(made.execute(*step)[0], expected)


@both_generations
def test_unknown_keys_draw_one_warning_that_lists_them(generation):
    strange = {"aStrangeKey": 1, "another": {"deep": [1]}, "isfa": True}
    made = new(NAMES[generation])
    with pytest.warns(UserWarning, match="unknown") as caught:
        assert made.set_param(json.dumps({**good_parameters(generation), **strange})) == 0
    (warning,) = caught
    listed = str(warning.message).split("parameters: ")[1].split(" (")[0]
    assert sorted(listed.split(", ")) == sorted(strange)
    assert json.loads(made.weight_spec())


@pytest.mark.parametrize(("alias", "key"), [("layerNum", "numHiddenLayers"), ("rankSize", "worldSize")])
def test_an_older_spelling_stands_for_its_key(alias, key):
    given = good_parameters("2024")
    value = given.pop(key)
    set_param("2024", {**given, alias: value})
    set_param("2024", {**given, alias: value, key: value})
    with pytest.raises(ValueError, match=f"{alias}.*{key}"):
        set_param("2024", {**given, alias: value, key: value + 1})
    with pytest.raises(ValueError, match=rf"{alias}|{key}"):
        set_param("2024", {**given, alias: "two"})


@pytest.mark.parametrize(
    ("name", "is_fa", "error"),
    [
        ("qwen_PAModel", True, (ValueError, NotImplementedError)),
        ("qwen_FAModel", True, NotImplementedError),
        ("qwen_FAModel", False, ValueError),
        ("qwen_DecoderModel", True, NotImplementedError),
        ("qwen_QwenDecoderModel", True, NotImplementedError),
    ],
)
def test_names_that_stand_for_one_value_of_isFA_refuse_the_other(name, is_fa, error):
    generation = "current" if name == NAMES["current"] else "2024"
    given = {**good_parameters(generation), "isFA": is_fa}
    with pytest.raises(error, match="isFA"):
        new(name).set_param(json.dumps(given))


@pytest.mark.parametrize(
    ("generation", "keys", "attention_is_packed", "mlp_is_packed"),
    [
        ("2024", {"packQuantType": [[1, 1]] * 2}, True, True),
        ("2024", {"packQuantType": [[4, 4]] * 2}, False, False),
        ("2024", {"packQuantType": [[1, 4]] * 2}, True, False),
        ("2024", {"packQuantType": [[4, 1]] * 2, "linearQuantType": [[0] * 7] * 2}, False, True),
        ("current", {"packQuantType": [[4, 1]] * 2, "linearQuantType": [[0] * 7] * 2}, False, True),
        ("current", {"linearDescs": [[1, -1, -1, 1, 1, -1, 1]] * 2}, True, True),
        ("current", {"linearDescs": [[0, -1, -1, 0, 0, -1, 0]] * 2}, True, True),
        ("current", {"linearDescs": [[1, 1, 1, 1, 1, 1, 1]] * 2}, True, True),
        ("current", {"linearDescs": [[0, 1, 0, 1, 1, 1, 1]] * 2}, False, True),
        ("current", {"linearDescs": [[1, 1, 1, 1, 0, 1, 1]] * 2}, True, False),
        ("current", {"packQuantType": [[0, 0]] * 2, "linearDescs": [[0, 1, 0, 1, 1, 1, 1]] * 2}, False, True),
        ("current", {"packQuantType": [[1, 4]] * 2, "linearDescs": [[0, 1, 0, 1, 1, 1, 1]] * 2}, True, False),
    ],
)
def test_the_parameters_decide_what_is_packed(generation, keys, attention_is_packed, mlp_is_packed):
    given = {**good_parameters(generation), "packQuantType": [], **keys}
    spec = {entry["name"] for entry in json.loads(set_param(generation, given).weight_spec())}
    for layer in range(SHAPE.layers):
        assert (f"layers.{layer}.attn.qkv.weight" in spec) == attention_is_packed
        assert (f"layers.{layer}.attn.k.weight" in spec) != attention_is_packed
        assert (f"layers.{layer}.mlp.gate_up.weight" in spec) == mlp_is_packed
        assert (f"layers.{layer}.mlp.up.weight" in spec) != mlp_is_packed


# --------------------------------------------------------------------------------------------------
# Whole callers


def hand_made_weights(
    model: Qwen2ForCausalLM,
    shape: Shape,
    dtype: torch.dtype,
    *,
    packed: list[tuple[bool, bool]],
    transposes: tuple[int, ...] = (1, 1, 1, 1, 1, 1, 1),
    head_transpose: int = 1,
    placeholder: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    embedding: str = "V",
) -> list[torch.Tensor]:
    """The list of set_weight with the slot numbers of the contract written out; weight_spec() is not asked.

    `packed` says for each layer whether q, k, v and whether gate, up are one weight. `embedding` is "V", "V+1" or
    "none".
    """
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    unused = torch.zeros(1, dtype=torch.float16) if placeholder is None else placeholder
    start = 0 if embedding == "none" else 1
    weights = [unused] * (start + 50 * shape.layers + 2)
    if start == 1:
        table = state["model.embed_tokens.weight"]
        extra = torch.zeros(1, shape.hidden, dtype=dtype)
        weights[0] = torch.cat([table, extra]) if embedding == "V+1" else table

    def put(base: int, column: int, parts: list[str]) -> None:
        matrix = torch.cat([state[f"{part}.weight"] for part in parts])
        weights[base] = matrix if transposes[column] != 0 else matrix.t().contiguous()
        if f"{parts[0]}.bias" in state:
            weights[base + 1] = torch.cat([state[f"{part}.bias"] for part in parts])

    for layer in range(shape.layers):
        base, prefix = start + 50 * layer, f"model.layers.{layer}"
        qkv = [f"{prefix}.self_attn.{part}_proj" for part in "qkv"]
        gate_up = [f"{prefix}.mlp.{part}_proj" for part in ("gate", "up")]
        weights[base] = state[f"{prefix}.input_layernorm.weight"]
        weights[base + 28] = state[f"{prefix}.post_attention_layernorm.weight"]
        if norm_bias is not None:
            weights[base + 1] = weights[base + 29] = norm_bias
        if packed[layer][0]:
            put(base + 4, 0, qkv)
        else:
            for column, part in enumerate(qkv):
                put(base + 4 + 6 * column, column, [part])
        put(base + 22, 3, [f"{prefix}.self_attn.o_proj"])
        if packed[layer][1]:
            put(base + 32, 4, gate_up)
        else:
            put(base + 32, 4, gate_up[:1])
            put(base + 38, 5, gate_up[1:])
        put(base + 44, 6, [f"{prefix}.mlp.down_proj"])
    head = state["lm_head.weight"]
    weights[-2] = state["model.norm.weight"]
    weights[-1] = head.t().contiguous() if head_transpose == 0 else head
    return weights


@dataclass
class Caller:
    """What a Python front end does around the two objects. Blocks are handed out one after the other."""

    shape: Shape
    dtype: torch.dtype
    is_current: bool
    encoder: torch.ScriptObject
    decoder: torch.ScriptObject
    block_size: int = 128
    embedding: torch.Tensor | None = None
    prefill_mask: torch.Tensor | None = None
    decode_mask: torch.Tensor | None = None
    tokens: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = (8, self.block_size, self.shape.kv_heads, self.shape.head_size)
        keys, values = (
            [torch.full(size, float("nan"), dtype=self.dtype) for _ in range(self.shape.layers)] for _ in range(2)
        )
        for made in (self.encoder, self.decoder):
            assert made.set_kv_cache(keys, values) == 0
        self.cos, self.sin = tables(self.shape, self.dtype)
        self.one = torch.ones(1, dtype=self.dtype)

    def _list(self, ids, positions, mask, slots, lengths, indices) -> list[torch.Tensor]:
        first = torch.tensor(ids, dtype=torch.int64)
        if self.embedding is not None:
            first = self.embedding[first]
        head = [
            first,
            torch.tensor(positions, dtype=torch.int64),
            self.cos,
            self.sin,
            self.one if mask is None else mask,
            torch.arange(len(lengths), dtype=torch.int32)[:, None],
            torch.tensor(slots, dtype=torch.int32),
            self.one,
            self.one,
        ]
        seq_len = torch.tensor(lengths, dtype=torch.int32)
        return [*head, self.one, seq_len, indices] if self.is_current else [*head, seq_len, indices, self.one]

    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        self.tokens = [list(prompt) for prompt in prompts]
        lengths = [len(prompt) for prompt in prompts]
        positions = [place for length in lengths for place in range(length)]
        slots = [n * self.block_size + place for n, length in enumerate(lengths) for place in range(length)]
        ids = [token for prompt in prompts for token in prompt]
        indices = torch.tensor(lengths, dtype=torch.int64).cumsum(0) - 1
        inputs = self._list(ids, positions, self.prefill_mask, slots, lengths, indices)
        (logits,) = self.encoder.execute(inputs, json.dumps({"seqLen": lengths}))
        return logits

    def decode(self, new: list[int]) -> torch.Tensor:
        for sequence, token in zip(self.tokens, new, strict=True):
            sequence.append(token)
        lengths = [len(sequence) for sequence in self.tokens]
        positions = [length - 1 for length in lengths]
        slots = [n * self.block_size + place for n, place in enumerate(positions)]
        inputs = self._list(new, positions, self.decode_mask, slots, lengths, torch.zeros(1, dtype=self.dtype))
        (logits,) = self.decoder.execute(inputs, json.dumps({"seqLen": lengths}))
        return logits

    def check(self, logits: torch.Tensor, model: Qwen2ForCausalLM) -> None:
        """Compares the last row of every sequence with transformers in this dtype and in float64."""
        same = copy.deepcopy(model).to(self.dtype)
        theirs = torch.stack([reference_logits(same, sequence)[-1] for sequence in self.tokens])
        exact = torch.stack([reference_logits(same.double(), sequence)[-1] for sequence in self.tokens])
        assert logits.shape == theirs.shape
        assert logits.dtype == self.dtype
        assert torch.isfinite(logits).all()
        if self.dtype == torch.float32:
            assert relative_error(logits, theirs) < FLOAT32_TOLERANCE
        else:
            assert relative_error(logits, exact) <= BFLOAT16_FACTOR * relative_error(theirs, exact)

    def run(self, model: Qwen2ForCausalLM, prompts: list[list[int]], steps: int = 3) -> None:
        """Prefill and a few greedy decode steps, each checked against transformers."""
        logits = self.prefill(prompts)
        self.check(logits, model)
        for _ in range(steps):
            logits = self.decode(logits.argmax(-1).tolist())
            self.check(logits, model)


def make_pair(name: str, prefill: dict, decode: dict, weights: list[torch.Tensor]) -> list[torch.ScriptObject]:
    """The order of calls of a front end: set_param on all, then the same weights for all."""
    pair = [new(name) for _ in range(2)]
    for made, given in zip(pair, (prefill, decode), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert made.set_param(json.dumps(given)) == 0
    for made in pair:
        assert made.set_weight(weights) == 0
    return pair


def random_prompts(lengths: list[int], vocab: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]


RECORDED_SHAPE = Shape(
    heads=4, kv_heads=2, head_size=32, layers=2, hidden=128, intermediate=256, vocab=512, max_positions=512
)
GROUPS = [
    *["wordEmbedTp", "wordEmbedDp", "attnTp", "attnDp", "attnInnerSp", "attnCp", "attnPrefixcacheCp"],
    *["attnOProjTp", "attnOProjDp", "mlpTp", "mlpDp", "lmHeadTp", "lmHeadDp", "moeTp", "moeEp"],
    *["moeEpIntraNode", "moeEpInterNode", "denseTp", "dynamicEplb"],
]
RECORDED_MAPPING = {
    "worldSize": 1,
    "rank": 0,
    "rankTableFile": "",
    "localWorldSize": 1,
    "lcclCommDomainLowerBound": 0,
    "lcclCommDomainUpperBound": 65536,
    **{
        group: {
            "rank": 0,
            "rankIds": [0],
            "bufferSize": {"moeTp": 64, "moeEp": 512}.get(group, 128),
            "groupId": 0,
        }
        for group in GROUPS
    },
}
RECORDED_PARAMETERS = {
    "isFA": False,
    "isBF16": True,
    "skipWordEmbedding": False,
    "isEmbeddingParallel": True,
    "isLmHeadParallel": True,
    "linearTransposeType": [[0, -1, -1, 1, 0, -1, 1]] * 2,
    "lmHeadTransposeType": 0,
    "enableSwiGLU": True,
    "enableSwigluQuant": True,
    "normEps": 1e-06,
    "normType": 0,
    "numAttentionHeadsPerRank": 4,
    "hiddenSizePerAttentionHead": 32,
    "numHiddenLayers": 2,
    "numKeyValueHeadsPerRank": 2,
    "rank": 0,
    "worldSize": 1,
    "backend": "lccl",
    "isUnpadInputs": True,
    "hiddenSize": 128,
    "enableFA3": False,
    "attnBackend": 0,
    "matmulBackend": 0,
    "quantGroupSize": 0,
    "enableKvQuant": False,
    "isLongSeq": False,
    "isYarn": False,
    "mscale": 1.0,
    "rankTableFile": "",
    "useQKNorm": False,
    "linearHasBias": [[True, False, False, False]] * 2,
    "enableGreedySearchOpt": False,
    "enableOmniAttention": False,
    "enableQScale": False,
    "mapping": RECORDED_MAPPING,
    "linearDescs": [[1, -1, -1, 1, 1, -1, 1]] * 2,
    "enablePreFetchWeight": False,
    "enableAddNorm": False,
    "enableIntraLayerAddNorm": False,
    "enableInterLayerAddNorm": False,
    "enableModelConfuscation": False,
    "modelConfuscationFd": 0,
    "enableRopeQuantKvcache": False,
}
RECORDED_PREFILL = {**RECORDED_PARAMETERS, "isPrefill": True, "enableLcoc": True, "enableMC2": False}
RECORDED_DECODE = {**RECORDED_PARAMETERS, "isPrefill": False, "enableLcoc": False, "preFetchWeightSize": 0}


def recorded_weights(model: Qwen2ForCausalLM, **options) -> list[torch.Tensor]:
    defaults = {
        "packed": [(True, True)] * 2,
        "transposes": (0, -1, -1, 1, 0, -1, 1),
        "head_transpose": 0,
        "placeholder": torch.ones(1),
        "norm_bias": torch.zeros(128, dtype=torch.bfloat16),
    }
    return hand_made_weights(model, RECORDED_SHAPE, torch.bfloat16, **{**defaults, **options})


def test_what_a_current_caller_was_recorded_to_send_runs_as_transformers_does():
    model = reference_model(RECORDED_SHAPE)
    weights = recorded_weights(model)
    sizes = {0: [512, 128], 5: [128, 256], 6: [256], 23: [128, 128], 33: [128, 512], 45: [128, 256], 102: [128, 512]}
    assert len(weights) == 103
    for slot, size in sizes.items():
        assert list(weights[slot].shape) == size
    assert len(GROUPS) == 19
    pair = make_pair("qwen_QwenDecoderModel", RECORDED_PREFILL, RECORDED_DECODE, weights)
    caller = Caller(
        RECORDED_SHAPE,
        torch.bfloat16,
        True,
        *pair,
        prefill_mask=torch.ones(128, 128, dtype=torch.bfloat16).triu(1),
        decode_mask=torch.zeros(1, 1, dtype=torch.bfloat16),
    )
    caller.run(model, random_prompts([7, 5], RECORDED_SHAPE.vocab), steps=4)


def test_the_older_weight_wrapper_path_of_a_current_caller_runs_too():
    """packQuantType and linearQuantType instead of linearDescs, zeros(1) fp16, an embedding of V+1 rows."""
    model = reference_model(RECORDED_SHAPE)
    weights = recorded_weights(model, placeholder=torch.zeros(1, dtype=torch.float16), embedding="V+1")
    assert weights[0].shape[0] == 513
    older = {"packQuantType": [[1, 1]] * 2, "linearQuantType": [[0, -1, -1, 0, 0, -1, 0]] * 2}
    both = [{**given, **older} for given in (RECORDED_PREFILL, RECORDED_DECODE)]
    for given in both:
        del given["linearDescs"]
    pair = make_pair("qwen_QwenDecoderModel", *both, weights)
    caller = Caller(RECORDED_SHAPE, torch.bfloat16, True, *pair)
    caller.run(model, random_prompts([7, 5], RECORDED_SHAPE.vocab, seed=1))


PARAMETERS_2024 = {
    "isFA": False,
    "isBF16": False,
    "withEmbedding": True,
    "isEmbeddingParallel": True,
    "isLmHeadParallel": True,
    "supportSwiGLU": True,
    "supportSpeculate": False,
    "rmsNormEps": 1e-6,
    "numAttentionHeadsPerRank": SHAPE.heads,
    "hiddenSizePerAttentionHead": SHAPE.head_size,
    "numHiddenLayers": SHAPE.layers,
    "numKeyValueHeadsPerRank": SHAPE.kv_heads,
    "rank": 0,
    "worldSize": 1,
    "enableLogN": False,
    "backend": "hccl",
    "tokenOffset": [],
    "seqLen": [],
}


def pair_2024(name: str, weights: list[torch.Tensor], **keys) -> list[torch.ScriptObject]:
    prefill = {**PARAMETERS_2024, **keys, "isPrefill": True, "supportLcoc": True}
    decode = {**PARAMETERS_2024, **keys, "isPrefill": False, "supportLcoc": False}
    return make_pair(name, prefill, decode, weights)


@pytest.mark.parametrize("name", ["qwen_PAModel", "qwen_DecoderModel"])
@pytest.mark.parametrize(
    "packed",
    [
        [(True, True)] * 2,
        [(False, False)] * 2,
        [(True, False), (False, True)],
        [(False, False), (True, True)],
    ],
    ids=str,
)
def test_a_caller_of_2024_without_packQuantType_runs_as_transformers_does(name, packed):
    model = reference_model()
    weights = hand_made_weights(model, SHAPE, torch.float32, packed=packed)
    caller = Caller(SHAPE, torch.float32, False, *pair_2024(name, weights))
    caller.run(model, random_prompts([7, 5, 1], SHAPE.vocab))
    spec = {entry["name"] for entry in json.loads(caller.encoder.weight_spec())}
    for layer, (attention, mlp) in enumerate(packed):
        assert (f"layers.{layer}.attn.qkv.weight" in spec) == attention
        assert (f"layers.{layer}.mlp.gate_up.weight" in spec) == mlp


@pytest.mark.parametrize(
    ("packed", "keys"),
    [
        ((True, True), {"packQuantType": [[1, 1]] * 2, "linearQuantType": [[0, -1, -1, 0, 0, -1, 0]] * 2}),
        ((False, False), {"packQuantType": [[4, 4]] * 2, "linearQuantType": [[0] * 7] * 2}),
        ((False, True), {"packQuantType": [[4, 1]] * 2, "linearQuantType": [[0] * 7] * 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("transposes", [(0, -1, -1, 1, 0, -1, 1), (1, 0, 1, 0, 1, 0, 0)], ids=str)
@pytest.mark.parametrize("head_transpose", [-1, 0, 1])
def test_a_caller_of_2024_with_every_table_runs_as_transformers_does(packed, keys, transposes, head_transpose):
    model = reference_model()
    weights = hand_made_weights(
        model,
        SHAPE,
        torch.float32,
        packed=[packed] * 2,
        transposes=transposes,
        head_transpose=head_transpose,
        norm_bias=torch.zeros(SHAPE.hidden),
    )
    tables_of_layers = {"linearTransposeType": [list(transposes)] * 2, "lmHeadTransposeType": head_transpose}
    pair = pair_2024("qwen_DecoderModel", weights, **keys, **tables_of_layers)
    Caller(SHAPE, torch.float32, False, *pair).run(model, random_prompts([6, 9], SHAPE.vocab), steps=1)


@both_generations
def test_the_row_after_the_vocabulary_is_an_ordinary_row(generation):
    model = reference_model()
    weights = hand_made_weights(model, SHAPE, torch.float32, packed=[(False, False)] * 2, embedding="V+1")
    weights[0][-1] = weights[0][7]
    runner = Runner(SHAPE, model, layout=Layout(NAMES[generation]))
    runner.encoder.set_weight(weights)
    logits = runner.prefill([[3, SHAPE.vocab, 5], [3, 7, 5]])
    assert torch.equal(logits[:3], logits[3:])
    assert logits.shape[1] == SHAPE.vocab
    with pytest.raises(ValueError, match="input_ids"):
        runner.prefill([[SHAPE.vocab + 1]])


@both_generations
@pytest.mark.parametrize("rows", [-1, 2])
def test_an_embedding_of_any_other_number_of_rows_is_refused(generation, rows):
    weights = hand_made_weights(reference_model(), SHAPE, torch.float32, packed=[(False, False)] * 2)
    weights[0] = torch.cat([weights[0], weights[0]])[: SHAPE.vocab + rows].contiguous()
    made = set_param(generation, good_parameters(generation))
    with pytest.raises(ValueError, match=rf"embedding.*{SHAPE.vocab}.*{SHAPE.vocab + rows}"):
        made.set_weight(weights)


@both_generations
def test_without_a_word_embedding_input_0_holds_embeddings(generation):
    model = reference_model()
    weights = hand_made_weights(model, SHAPE, torch.float32, packed=[(True, True)] * 2, embedding="none")
    assert len(weights) == 50 * SHAPE.layers + 2
    if generation == "2024":
        pair = pair_2024("qwen_PAModel", weights, withEmbedding=False)
    else:
        keys = {"skipWordEmbedding": True, "packQuantType": [[1, 1]] * 2, "hiddenSize": SHAPE.hidden}
        both = [{**good_parameters("current", is_prefill), **keys} for is_prefill in (True, False)]
        pair = make_pair(NAMES["current"], *both, weights)
    spec = json.loads(pair[0].weight_spec())
    assert [entry["slot"] for entry in spec][:1] == [0]
    assert "embedding.weight" not in {entry["name"] for entry in spec}
    embedding = model.state_dict()["model.embed_tokens.weight"]
    caller = Caller(SHAPE, torch.float32, generation == "current", *pair, embedding=embedding)
    caller.run(model, random_prompts([7, 5], SHAPE.vocab))
    for wrong in (embedding[:, :-1].contiguous(), embedding.bfloat16(), embedding[:, 0].long()):
        caller.embedding = wrong
        with pytest.raises(ValueError, match=rf"input_ids.*float32.*{SHAPE.hidden}"):
            caller.prefill([[1, 2, 3]])


def test_a_hidden_size_that_differs_from_the_weights_is_refused():
    weights = hand_made_weights(reference_model(), SHAPE, torch.float32, packed=[(False, False)] * 2)
    made = set_param("current", {**good_parameters("current"), "hiddenSize": SHAPE.hidden + 1})
    with pytest.raises(ValueError, match=rf"hiddenSize.*{SHAPE.hidden + 1}.*{SHAPE.hidden}"):
        made.set_weight(weights)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "biases",
    [[True, False, False, False], [True, True, False, False], [True, False, True, True], [False, False, False, False]],
    ids=str,
)
def test_linearHasBias_decides_which_linears_have_a_bias(biases, packed):
    model = copy.deepcopy(reference_model())
    generator = torch.Generator().manual_seed(1)
    linears = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    for layer in model.model.layers:
        modules = dict(layer.self_attn.named_children()) | dict(layer.mlp.named_children())
        for has_bias, names in zip(biases, linears, strict=True):
            for name in names:
                bias = torch.randn(modules[name].out_features, generator=generator)
                modules[name].bias = torch.nn.Parameter(bias) if has_bias else None
    keys = {"linearHasBias": [biases] * 2, "packQuantType": [[1, 1] if packed else [4, 4]] * 2}
    both = [{**good_parameters("current", is_prefill), **keys} for is_prefill in (True, False)]
    weights = hand_made_weights(model, SHAPE, torch.float32, packed=[(packed, packed)] * 2)
    caller = Caller(SHAPE, torch.float32, True, *make_pair(NAMES["current"], *both, weights))
    caller.run(model, random_prompts([4, 9], SHAPE.vocab), steps=1)


# --------------------------------------------------------------------------------------------------
# What is not looked at

PLACES = {
    "2024": {"mask": 4, "blocks": 5, "cache_idx": 7, "offset": 8, "indices": 10, "placeholder": 11},
    "current": {"mask": 4, "blocks": 5, "cache_idx": 7, "offset": 8, "placeholder": 9, "indices": 11},
}
UNUSED = {
    "prefill": ["blocks", "cache_idx", "offset", "placeholder"],
    "decode": ["mask", "cache_idx", "offset", "placeholder", "indices"],
}
ANYTHING = {
    "float64": torch.zeros(1, dtype=torch.float64),
    "bool": torch.ones(1, dtype=torch.bool),
    "complex": torch.ones(3, dtype=torch.complex64),
    "int16": torch.ones(2, 2, dtype=torch.int16),
    "float16": torch.zeros(1, dtype=torch.float16),
    "meta": torch.zeros(5, device="meta"),
    "empty": torch.zeros(0),
    "scalar": torch.tensor(1.0),
    "rank 9": torch.zeros([1] * 9),
    "strided": torch.zeros(4, 6).t()[::2],
    "sparse": torch.eye(3).to_sparse(),
    "NaN": torch.full((7, 3), float("nan")),
}


class Step:
    """A prefill or decode step whose inputs can be replaced, and the logits that it gives."""

    def __init__(self, phase: str, generation: str) -> None:
        runner = Runner(SHAPE, reference_model(), layout=Layout(NAMES[generation]))
        inputs, self.text = runner.prefill_inputs([[1, 2, 3], [4, 5]])
        self.made, self.inputs = runner.encoder, inputs
        if phase == "decode":
            runner.encoder.execute(inputs, self.text)
            self.made = runner.decoder
            self.inputs, self.text = runner.decode_inputs({0: 6, 1: 7})
        self.places = PLACES[generation]
        self.expected = self.run({})

    def run(self, changes: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = list(self.inputs)
        for name, tensor in changes.items():
            inputs[self.places[name]] = tensor
        (logits,) = self.made.execute(inputs, self.text)
        return logits


@cache
def step(phase: str, generation: str) -> Step:
    return Step(phase, generation)


@pytest.mark.parametrize("what", ANYTHING)
@both_generations
@pytest.mark.parametrize("phase", UNUSED)
def test_inputs_that_a_phase_does_not_use_may_be_anything(phase, generation, what):
    aim = step(phase, generation)
    for name in UNUSED[phase]:
        assert torch.equal(aim.run({name: ANYTHING[what]}), aim.expected)
    assert torch.equal(aim.run(dict.fromkeys(UNUSED[phase], ANYTHING[what])), aim.expected)


@both_generations
@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(torch.ones(1), id="placeholder"),
        pytest.param(torch.zeros(1, 1, dtype=torch.bfloat16), id="1x1"),
        pytest.param(torch.tensor(0.0), id="scalar"),
        pytest.param(torch.zeros(3, 3), id="longest prompt"),
        pytest.param(torch.ones(128, 128, dtype=torch.bfloat16).triu(1), id="128x128"),
        pytest.param(torch.full((128, 128), float("-inf"), dtype=torch.float16).triu(1), id="fp16"),
        pytest.param(torch.ones(2048, 2048, dtype=torch.int8), id="int8"),
        pytest.param(torch.full((5, 5), float("nan")), id="NaN"),
        pytest.param(torch.zeros(4, 4, device="meta"), id="meta"),
        pytest.param(torch.zeros(8, 8)[::2, ::2], id="strided"),
    ],
)
def test_attention_is_causal_whatever_a_square_mask_or_a_placeholder_holds(generation, mask):
    aim = step("prefill", generation)
    assert torch.equal(aim.run({"mask": mask}), aim.expected)


@both_generations
@pytest.mark.parametrize("size", [(5,), (1, 5, 5), (2, 5, 5), (5, 6), (1, 5), (1, 1, 5, 5)], ids=str)
def test_a_mask_of_any_other_shape_is_refused_in_prefill_and_ignored_in_decode(generation, size):
    mask = torch.zeros(size)
    with pytest.raises(ValueError, match=r"attention_mask.*square") as error:
        step("prefill", generation).run({"mask": mask})
    assert str(list(size)) in str(error.value)
    aim = step("decode", generation)
    assert torch.equal(aim.run({"mask": mask}), aim.expected)


@pytest.mark.parametrize("what", ANYTHING)
@pytest.mark.parametrize("packed", [False, True])
def test_weight_slots_that_the_parameters_make_unused_may_be_anything(what, packed):
    unused = ANYTHING[what]
    keys = {"packQuantType": [[1, 1] if packed else [4, 4]] * 2, "linearQuantType": [[0] * 7] * 2}
    options = {"packed": [(packed, packed)] * 2, "norm_bias": unused}
    model = reference_model()
    made = set_param("2024", {**good_parameters("2024"), **keys})
    for placeholder in (None, unused):
        weights = hand_made_weights(model, SHAPE, torch.float32, placeholder=placeholder, **options)
        made.set_weight(weights)
        runner = Runner(SHAPE, model)
        made.set_kv_cache(runner.caches[0::2], runner.caches[1::2])
        inputs, text = runner.prefill_inputs([[1, 2, 3], [4, 5]])
        torch.testing.assert_close(made.execute(inputs, text)[0], step("prefill", "2024").expected)
