"""The keys of the JSON parameters: required, refused, accepted, meaningless."""

from __future__ import annotations

import json

import pytest
import torch
from contract_callers import (
    NAMES,
    SHAPE,
    both_generations,
    good_parameters,
    hand_made_weights,
    new,
    reference_model,
    set_param,
)
from reference import Layout, Runner

pytestmark = pytest.mark.usefixtures("one_thread")

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
