"""Whole callers, as recorded from front ends of both generations, run as transformers does."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from contract_callers import (
    NAMES,
    SHAPE,
    Caller,
    both_generations,
    good_parameters,
    hand_made_weights,
    make_pair,
    reference_model,
    set_param,
)
from reference import Layout, Runner, Shape
from transformers import Qwen2ForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")


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
