"""Random Qwen2 models, and steps through the C++ object, for comparison with transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import modeltorch  # noqa: F401  registers torch.classes.ModelTorch

DEVICES = [
    device
    for device in ("cpu", "cuda")
    if device in torch.ops.ModelTorch.devices() and (device == "cpu" or torch.cuda.is_available())
]
"""Where the tests run: the devices that this library has kernels for and that this machine has."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNUSED_WEIGHT = torch.zeros(1, dtype=torch.float16)


@dataclass(frozen=True)
class Shape:
    """The sizes of a random model."""

    heads: int = 4
    kv_heads: int = 2
    head_size: int = 16
    layers: int = 2
    hidden: int = 64
    intermediate: int = 96
    vocab: int = 152
    tied: bool = False
    max_positions: int = 512

    def config(self) -> Qwen2Config:
        config = Qwen2Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.max_positions,
            tie_word_embeddings=self.tied,
        )
        config.head_dim = self.head_size
        return config


def random_model(shape: Shape, seed: int = 0) -> Qwen2ForCausalLM:
    """transformers' model in float32 with weights large enough that logits are far apart."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(shape.config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model


@torch.no_grad()
def reference_logits(model: Qwen2ForCausalLM, tokens: list[int]) -> torch.Tensor:
    """[len, vocab] of one sequence, in the model's dtype."""
    return model(torch.tensor([tokens])).logits[0]


@dataclass(frozen=True)
class Layout:
    """How weights are handed over: which generation, what is packed, how each linear lies in memory."""

    model_name: str = "qwen_PAModel"
    qkv_packed: bool = False
    gate_up_packed: bool = False
    transposes: tuple[int, ...] = (1, 1, 1, 1, 1, 1, 1)
    head_transpose: int = 1
    extra_embedding_row: bool = False

    @property
    def is_current(self) -> bool:
        return self.model_name == "qwen_QwenDecoderModel"


def parameters(shape: Shape, layout: Layout, dtype: torch.dtype, is_prefill: bool) -> dict:
    """The JSON of set_param as a caller of that generation sends it."""
    layers = shape.layers
    packs = [[1 if layout.qkv_packed else 4, 1 if layout.gate_up_packed else 4]] * layers
    common = {
        "isFA": False,
        "isPrefill": is_prefill,
        "isBF16": dtype == torch.bfloat16,
        "numHiddenLayers": layers,
        "numAttentionHeadsPerRank": shape.heads,
        "numKeyValueHeadsPerRank": shape.kv_heads,
        "hiddenSizePerAttentionHead": shape.head_size,
        "lmHeadTransposeType": layout.head_transpose,
        "linearTransposeType": [list(layout.transposes)] * layers,
        "linearQuantType": [[0] * 7] * layers,
        "packQuantType": packs,
        "rank": 0,
        "worldSize": 1,
        "backend": "lccl",
    }
    if layout.is_current:
        current = {"isUnpadInputs": True, "normEps": 1e-6, "normType": 0}
        return {**common, **current, "linearHasBias": [[True, False, False, False]] * layers}
    return {**common, "rmsNormEps": 1e-6}


def weight_list(spec: list[dict], model: Qwen2ForCausalLM, layout: Layout, dtype: torch.dtype) -> list[torch.Tensor]:
    """The list of set_weight, made from transformers' weights by the rules of docs/contract.md, not by the spec's
    shapes: those are what is under test."""
    state = model.state_dict()
    weights = [UNUSED_WEIGHT] * (spec[-1]["slot"] + 1)
    for entry in spec:
        tensor = torch.cat([state[_full_name(name)] for name in entry["checkpoint"].split("+")]).to(dtype)
        if _is_untransposed(entry["name"], layout):
            tensor = tensor.t().contiguous()
        if entry["name"] == "embedding.weight" and layout.extra_embedding_row:
            tensor = torch.cat([tensor, torch.zeros(1, tensor.shape[1], dtype=dtype)])
        weights[entry["slot"]] = tensor
    return weights


def _full_name(name: str) -> str:
    return name if name.startswith(("model.", "lm_head.")) else f"model.layers.{name}"


def _is_untransposed(name: str, layout: Layout) -> bool:
    if name == "lm_head.weight":
        return layout.head_transpose == 0
    linear = name.removesuffix(".weight").rsplit(".", 1)[-1]
    order = {"qkv": 0, "q": 0, "k": 1, "v": 2, "o": 3, "gate_up": 4, "gate": 4, "up": 5, "down": 6}
    return name.endswith(".weight") and linear in order and layout.transposes[order[linear]] == 0


def tables(shape: Shape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin as modeling_qwen2.py computes them, in float32."""
    inv_freq = 1.0 / (10000.0 ** (torch.arange(0, shape.head_size, 2).float() / shape.head_size))
    angles = torch.arange(shape.max_positions).float()[:, None] * inv_freq
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@dataclass
class Runner:
    """A prefill and a decode object over one cache whose unwritten rows are NaN.

    Sequences are added with `prefill` and grow with `decode`; `tokens` says what each holds.
    """

    shape: Shape
    model: Qwen2ForCausalLM
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    layout: Layout = field(default_factory=Layout)
    block_size: int = 16
    blocks: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        shape = (self.blocks, self.block_size, self.shape.kv_heads, self.shape.head_size)
        nan = torch.full(shape, float("nan"), dtype=self.dtype)
        self.caches = [nan.clone().to(self.device) for _ in range(2 * self.shape.layers)]
        self.free = torch.randperm(self.blocks, generator=self.generator).tolist()
        self.tokens: list[list[int]] = []
        self.tables_of: list[list[int]] = []
        self.cos, self.sin = (table.to(self.device) for table in tables(self.shape, self.dtype))
        self.one = torch.ones(1, dtype=self.dtype).to(self.device)
        self.encoder, self.decoder = (self._object(is_prefill) for is_prefill in (True, False))

    def _object(self, is_prefill: bool) -> torch.ScriptObject:
        made = torch.classes.ModelTorch.ModelTorch(self.layout.model_name)
        made.set_param(json.dumps(parameters(self.shape, self.layout, self.dtype, is_prefill)))
        weights = weight_list(json.loads(made.weight_spec()), self.model, self.layout, self.dtype)
        made.set_weight([weight.to(self.device) for weight in weights])
        made.set_kv_cache(self.caches[0::2], self.caches[1::2])
        return made

    def _slot(self, sequence: int, position: int) -> int:
        table = self.tables_of[sequence]
        while len(table) <= position // self.block_size:
            table.append(self.free.pop())
        return table[position // self.block_size] * self.block_size + position % self.block_size

    def _block_tables(self, sequences: list[int]) -> torch.Tensor:
        width = max(len(self.tables_of[sequence]) for sequence in sequences)
        rows = [self.tables_of[sequence] + [0] * (width - len(self.tables_of[sequence])) for sequence in sequences]
        return torch.tensor(rows, dtype=torch.int32)

    def inputs(
        self,
        ids: list[int],
        positions: list[int],
        slots: list[int],
        block_tables: torch.Tensor,
        lengths: list[int],
        indices: torch.Tensor,
    ) -> list[torch.Tensor]:
        """The input list in the order of the layout's generation."""
        head = [
            torch.tensor(ids, dtype=torch.int64),
            torch.tensor(positions, dtype=torch.int64),
            self.cos,
            self.sin,
            self.one,
            block_tables,
            torch.tensor(slots, dtype=torch.int32),
            self.one,
            self.one,
        ]
        tail = [torch.tensor(lengths, dtype=torch.int32), indices]
        every = [*head, self.one, *tail] if self.layout.is_current else [*head, *tail, self.one]
        return [tensor.to(self.device) for tensor in every]

    def prefill_inputs(self, prompts: list[list[int]], indices: list[int] | None = None) -> tuple[list, str]:
        """Adds the prompts as new sequences; returns what execute takes. indices None asks for every row."""
        first = len(self.tokens)
        self.tokens += [list(prompt) for prompt in prompts]
        self.tables_of += [[] for _ in prompts]
        positions = [place for prompt in prompts for place in range(len(prompt))]
        slots = [self._slot(first + n, place) for n, prompt in enumerate(prompts) for place in range(len(prompt))]
        lengths = [len(prompt) for prompt in prompts]
        rows = torch.arange(sum(lengths)) if indices is None else torch.tensor(indices, dtype=torch.int64)
        block_tables = self._block_tables(list(range(first, len(self.tokens))))
        ids = [token for prompt in prompts for token in prompt]
        return self.inputs(ids, positions, slots, block_tables, lengths, rows), json.dumps({"seqLen": lengths})

    def prefill(self, prompts: list[list[int]], indices: list[int] | None = None) -> torch.Tensor:
        return self.encoder.execute(*self.prefill_inputs(prompts, indices))[0].cpu()

    def decode_inputs(self, new_tokens: dict[int, int]) -> tuple[list, str]:
        """Appends a token to each of the given sequences; returns what execute takes."""
        sequences = list(new_tokens)
        for sequence, token in new_tokens.items():
            self.tokens[sequence].append(token)
        lengths = [len(self.tokens[sequence]) for sequence in sequences]
        slots = [self._slot(sequence, length - 1) for sequence, length in zip(sequences, lengths, strict=True)]
        inputs = self.inputs(
            list(new_tokens.values()),
            [length - 1 for length in lengths],
            slots,
            self._block_tables(sequences),
            lengths,
            torch.zeros(1),
        )
        return inputs, json.dumps({"seqLen": lengths})

    def decode(self, new_tokens: dict[int, int]) -> torch.Tensor:
        return self.decoder.execute(*self.decode_inputs(new_tokens))[0].cpu()


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of `exact`; NaN anywhere gives NaN, which passes no comparison."""
    difference = value.double() - exact.double()
    return (difference.norm() / exact.double().norm()).item()
