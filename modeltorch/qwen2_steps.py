"""The steps of Qwen2 through torch.classes.ModelTorch.ModelTorch, with the helpers that callers know.

The helpers (init_ascend_operations, get_weights, init_ascend_weight, init_kvcache, prepare_inputs_for_ascend,
execute_ascend_operator, forward) keep the names and the meaning of the Ascend front ends whose scripts run here
unchanged; docs/contract.md describes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from modeltorch import checkpoint
from modeltorch.configuration import check_config, rope_tables
from modeltorch.weight_list import packing_shown, weight_list

KvCache = Sequence[tuple[torch.Tensor, torch.Tensor]]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MIXED = 4  # packQuantType MIX_W8A8: with float linears it says only that q, k, v and gate, up are separate


def _checked_dtype(dtype: str | torch.dtype) -> torch.dtype:
    for name, known in _DTYPES.items():
        if dtype in (name, known):
            return known
    raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype}")


def _checked_device(given: str | torch.device) -> torch.device:
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be cpu, cuda, or npu with torch_npu, got {given!r}") from error
    if device.type not in ("cpu", "cuda", "npu"):
        raise NotImplementedError(f"device must be cpu, cuda or npu, got {device}: other devices are not built")
    if device.type not in torch.ops.ModelTorch.devices():
        raise NotImplementedError(
            f"this build has no kernels for device {device.type}: install torch for it and build again (setup.py)"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device}: torch finds no GPU on this machine")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class Qwen2Steps:
    """A prefill and a decode object over one set of weights, and what a step needs beside them.

    Attributes:
        acl_encoder_operation, acl_decoder_operation: the prefill and the decode object.
        ascend_weight: the weight list that init_ascend_weight gave to both, in slot order.
    """

    def __init__(
        self,
        config: Any,
        weights: Mapping[str, torch.Tensor],
        *,
        device: str | torch.device,
        dtype: str | torch.dtype,
        packed_folder: Path | None,
    ) -> None:
        """Makes the objects; the first step gives them their weights. Arguments are those of FlashQwen2ForCausalLM.

        Raises:
            ValueError: an unknown dtype, or sizes that contradict each other.
            NotImplementedError: an architecture, a feature or a device that is not built.
        """
        check_config(config)
        self.config = config
        self.device = _checked_device(device)
        self.dtype = _checked_dtype(dtype)
        self.num_layers: int = config.num_hidden_layers
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = getattr(config, "num_key_value_heads", None) or self.num_heads
        self.hidden_size: int = config.hidden_size
        self.head_size: int = getattr(config, "head_dim", None) or self.hidden_size // self.num_heads
        self.vocab_size: int = config.vocab_size
        self.max_positions: int = config.max_position_embeddings
        cos, sin = rope_tables(config, self.head_size, self.dtype)
        self.cos_table, self.sin_table = cos.to(self.device), sin.to(self.device)
        self.placeholder = torch.ones(1, dtype=self.dtype).to(self.device)
        self.ascend_weight: list[torch.Tensor] = []
        self._has_weights = False
        self._weights = weights
        self._packed_folder = packed_folder
        self._bound_cache: list[torch.Tensor] = []
        self._last_operation: Any = None
        self.init_ascend_operations(config)

    def init_ascend_operations(self, config: Any) -> None:
        """Makes the prefill (encoder) and the decode (decoder) object and gives both their parameters."""
        parameters = {
            "isFA": False,
            "isBF16": self.dtype == torch.bfloat16,
            "withEmbedding": True,
            "isEmbeddingParallel": True,
            "isLmHeadParallel": True,
            "lmHeadTransposeType": 1,
            "supportSwiGLU": True,
            "rmsNormEps": config.rms_norm_eps,
            "numAttentionHeadsPerRank": self.num_heads,
            "hiddenSizePerAttentionHead": self.head_size,
            "numHiddenLayers": self.num_layers,
            "numKeyValueHeadsPerRank": self.num_kv_heads,
            "rank": 0,
            "worldSize": 1,
            "backend": "hccl",
            "packQuantType": [[_MIXED, _MIXED]] * self.num_layers,
            "linearQuantType": [[0] * 7] * self.num_layers,
            "linearTransposeType": [[1] * 7] * self.num_layers,
        }
        if self._packed_folder is not None:
            parameters["packedWeightFolder"] = str(self._packed_folder)
        self.acl_encoder_operation = torch.classes.ModelTorch.ModelTorch("qwen_PAModel")
        self.acl_decoder_operation = torch.classes.ModelTorch.ModelTorch("qwen_PAModel")
        self.acl_encoder_operation.set_param(json.dumps({**parameters, "isPrefill": True, "supportLcoc": False}))
        self.acl_decoder_operation.set_param(json.dumps({**parameters, "isPrefill": False, "supportLcoc": False}))

    def get_weights(self) -> list[torch.Tensor]:
        """The weight list in slot order, as the C++ side describes it; unused slots hold one element.

        Raises:
            ValueError: the checkpoint lacks a tensor.
        """
        sizes = {
            "hidden": self.hidden_size,
            "intermediate": self.config.intermediate_size,
            "vocab": self.vocab_size,
            "vocab or vocab + 1": self.vocab_size,
        }
        specs = json.loads(self.acl_encoder_operation.weight_spec())
        weights = weight_list(specs, self._weights, sizes, self._is_tied(), self.dtype, self.device)
        if isinstance(self._weights, checkpoint.SafetensorsWeights):
            self._weights.close()
        return weights

    def init_ascend_weight(self) -> None:
        """Hands the weight list to both objects and keeps it."""
        self.ascend_weight = self.get_weights()
        with packing_shown(self.acl_encoder_operation.progress):
            self.acl_encoder_operation.set_weight(self.ascend_weight)
        self.acl_decoder_operation.set_weight(self.ascend_weight)  # shares what the first has packed
        self._has_weights = True

    def init_kvcache(self, kv_cache: KvCache) -> None:
        """Hands the caches to both objects, unless they hold these very tensors already.

        Args:
            kv_cache: (key, value) a layer, each [blocks, block_size, kv_heads, head_size].
        """
        tensors = [tensor for pair in kv_cache for tensor in pair]
        same = len(tensors) == len(self._bound_cache) and all(
            new is old for new, old in zip(tensors, self._bound_cache, strict=True)
        )
        if same:
            return
        keys, values = tensors[0::2], tensors[1::2]
        self.acl_encoder_operation.set_kv_cache(keys, values)
        self.acl_decoder_operation.set_kv_cache(keys, values)
        self._bound_cache = tensors

    def prepare_inputs_for_ascend(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        is_prefill: bool,
        kv_cache: KvCache,
        block_tables: torch.Tensor,
        slots: torch.Tensor,
        input_lengths: torch.Tensor,
        max_seq_len: int,
        lm_head_indices: torch.Tensor | None = None,
        host_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> tuple[list[torch.Tensor], str]:
        """The input list of a step in the 2024 order, and its JSON. Arguments are those of forward.

        Raises:
            NotImplementedError: a keyword argument that asks for a feature that is not built.
        """
        for name, value in kwargs.items():
            if value is not None:
                raise NotImplementedError(f"forward does not take {name} yet, got {value!r}")
        if not is_prefill:
            lm_head_indices = self.placeholder
        elif lm_head_indices is None:
            lm_head_indices = torch.arange(input_ids.shape[0], dtype=torch.int64)
        inputs = [
            input_ids,
            position_ids.to(torch.int64),
            self.cos_table,
            self.sin_table,
            self.placeholder,  # the mask: attention is causal whatever it holds
            block_tables.to(torch.int32),
            slots.to(torch.int32),
            self.placeholder,
            self.placeholder,
            input_lengths.to(torch.int32),
            lm_head_indices.to(torch.int64) if is_prefill else lm_head_indices,
            self.placeholder,
        ]
        lengths = input_lengths.tolist() if host_lengths is None else list(host_lengths)
        return [tensor.to(self.device) for tensor in inputs], json.dumps({"seqLen": lengths})

    def execute_ascend_operator(self, acl_inputs: list[torch.Tensor], acl_param: str, is_prefill: bool) -> torch.Tensor:
        """Runs a prepared step; returns the logits.

        Raises:
            RuntimeError: also for what went wrong in the step before this one after its call had returned.
        """
        operation = self.acl_encoder_operation if is_prefill else self.acl_decoder_operation
        if operation is not self._last_operation:
            self.settle()  # each object knows of its own steps alone, but both work on one cache
        self._last_operation = operation
        logits: torch.Tensor = operation.execute(acl_inputs, acl_param)[0]
        return logits

    def settle(self) -> None:
        """Throws what went wrong in the last step after its call had returned; call it before logits are used.

        On Ascend a step may still be on its way to the device when its call returns (docs/ascend.md). Once its logits
        have been read to the host nothing is, and this returns at once, as it always does on a CPU.

        Raises:
            RuntimeError: the last step failed; its logits are worth nothing. It is raised once.
        """
        if self._last_operation is not None:
            self._last_operation.settle()

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        is_prefill: bool,
        kv_cache: KvCache,
        block_tables: torch.Tensor,
        slots: torch.Tensor,
        input_lengths: torch.Tensor,
        max_seq_len: int,
        lm_head_indices: torch.Tensor | None = None,
        host_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One step of unpadded tokens.

        Args:
            input_ids: int64 [n], the sequences one after the other (one token each in decode).
            position_ids: int64 [n].
            is_prefill: whole prompts; false: one new token a sequence.
            kv_cache: see init_kvcache; written in place.
            block_tables: int32 [B, width].
            slots: int32 [n], where each token's key and value go; -1 drops them.
            input_lengths: int32 [B], prompt lengths, or contexts including the new token in decode.
            max_seq_len: the longest context; kept for callers, not needed here.
            lm_head_indices: int64 [rows], the tokens whose logits are wanted; None: all. Ignored in decode.
            host_lengths: the values of input_lengths; None reads them from the device, which waits for it.
            **kwargs: features that are not built are refused unless None.

        Returns:
            Logits [rows, vocab] ([B, vocab] in decode) in the model's dtype.

        Raises:
            ValueError: inputs that do not fit each other, named with expected and given.
        """
        if not self._has_weights:
            self.init_ascend_weight()
        self.init_kvcache(kv_cache)
        acl_inputs, acl_param = self.prepare_inputs_for_ascend(
            input_ids,
            position_ids,
            is_prefill,
            kv_cache,
            block_tables,
            slots,
            input_lengths,
            max_seq_len,
            lm_head_indices,
            host_lengths,
            **kwargs,
        )
        return self.execute_ascend_operator(acl_inputs, acl_param, is_prefill)

    __call__ = forward

    def _is_tied(self) -> bool:
        """Whether the head is the embedding; a head of its own in the file counts, as transformers 5 has it."""
        head = self._weights.get("lm_head.weight")
        return bool(self.config.tie_word_embeddings) and (
            head is None or torch.equal(head, self._weights["model.embed_tokens.weight"])
        )
