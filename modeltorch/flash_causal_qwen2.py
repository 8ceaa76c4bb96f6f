"""Qwen2 through torch.classes.ModelTorch.ModelTorch, with the helpers that callers know.

The step-level helpers (init_ascend_operations, get_weights, init_ascend_weight, init_kvcache,
prepare_inputs_for_ascend, execute_ascend_operator, forward) keep the names and the meaning of the Ascend front ends
whose scripts run here unchanged; docs/contract.md describes them. Above them, from_pretrained, generate and
compute_logits need no knowledge of steps.
"""

from __future__ import annotations

import json
import operator
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from modeltorch import checkpoint
from modeltorch.configuration import check_config, rope_tables
from modeltorch.engine import Engine, Generation, Request
from modeltorch.paged_cache import DEFAULT_BLOCK_SIZE, PagedCache, free_memory
from modeltorch.sampling import Sampling
from modeltorch.weight_list import packing_shown, weight_list

KvCache = Sequence[tuple[torch.Tensor, torch.Tensor]]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MIXED = 4  # packQuantType MIX_W8A8: with float linears it says only that q, k, v and gate, up are separate


def _checked_dtype(dtype: str | torch.dtype) -> torch.dtype:
    for name, known in _DTYPES.items():
        if dtype in (name, known):
            return known
    raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype}")


def _check_device(device: torch.device) -> None:
    if device.type not in ("cpu", "cuda", "npu"):
        raise NotImplementedError(f"device must be cpu, cuda or npu, got {device}: other devices are not built")
    if device.type not in torch.ops.ModelTorch.devices():
        raise NotImplementedError(
            f"this build has no kernels for device {device.type}: install torch for it and build again (setup.py)"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device}: torch finds no GPU on this machine")


class FlashQwen2ForCausalLM:
    """Qwen2 and Qwen2.5 with paged attention.

    Attributes:
        acl_encoder_operation, acl_decoder_operation: the prefill and the decode object.
        ascend_weight: the weight list that init_ascend_weight gave to both, in slot order; from_pretrained drops it,
            since the objects hold what they need, packed where that is faster.
        cache: the paged cache that generate and compute_logits use; made at first use.
    """

    def __init__(
        self,
        config: Any,
        weights: Mapping[str, torch.Tensor],
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "bfloat16",
        tokenizer: Any | None = None,
        stop_tokens: frozenset[int] = frozenset(),
        block_size: int = DEFAULT_BLOCK_SIZE,
        num_blocks: int | None = None,
        cache_gb: float | None = None,
        packed_folder: Path | None = None,
    ) -> None:
        """Keeps the parts; the first step sets the objects up.

        Args:
            config: a transformers Qwen2Config, or anything with its attributes.
            weights: tensors by checkpoint name. Those of the right dtype and device are used as they are.
            device: where to run: "cpu", "cuda" in a build with CUDA, or "npu" in one with Ascend (docs/ascend.md).
            dtype: "bfloat16", "float16" or "float32", the type of weights, cache and activations.
            tokenizer: a transformers tokenizer, or None: then prompts must be token lists.
            stop_tokens: ids that end an answer.
            block_size: tokens of a cache block.
            num_blocks: blocks of the cache; None takes cache_gb.
            cache_gb: GiB of the cache; None takes the smaller of 4 and a quarter of free memory, on a GPU or
                an NPU three quarters of its free memory.
            packed_folder: where packed weights are kept from one process to the next; None: nowhere.

        Raises:
            ValueError: an unknown dtype, or sizes that contradict each other.
            NotImplementedError: an architecture, a feature or a device that is not built.
        """
        check_config(config)
        self.config = config
        try:
            self.device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device must be cpu, cuda, or npu with torch_npu, got {device!r}") from error
        _check_device(self.device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.dtype = _checked_dtype(dtype)
        self.tokenizer = tokenizer
        self.stop_tokens = stop_tokens
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
        self._cache_options = {"block_size": block_size, "num_blocks": num_blocks, "cache_gb": cache_gb}
        self._cache: PagedCache | None = None
        PagedCache.check_sizes(block_size=block_size, num_blocks=num_blocks, cache_gb=cache_gb)
        self._lock = threading.RLock()
        self.init_ascend_operations(config)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "bfloat16",
        block_size: int = DEFAULT_BLOCK_SIZE,
        num_blocks: int | None = None,
        cache_gb: float | None = None,
        cache_packed: bool = False,
    ) -> FlashQwen2ForCausalLM:
        """Opens a Hugging Face checkpoint: config.json, safetensors, and a tokenizer if there is one.

        Weights are memory-mapped; those that already have `dtype` are not copied.

        Args:
            path_or_hub_id: a folder, or owner/name on the hub.
            device: see __init__.
            dtype: see __init__.
            block_size: see __init__.
            num_blocks: see __init__.
            cache_gb: see __init__.
            cache_packed: keep the packed weights in the checkpoint's folder, in .modeltorch, and take them from there
                the next time. Processes that run at once share their memory. The folder may be removed at any time; one
                that cannot be written costs a warning.

        Raises:
            FileNotFoundError: no such checkpoint, or one with a file missing.
            ValueError: a tensor that is missing or has the wrong shape, and as __init__.
            NotImplementedError: as __init__.
            ImportError: the extra [hf] is not installed.
        """
        folder = checkpoint.resolve(path_or_hub_id)
        config = checkpoint.open_config(folder)
        model = cls(
            config,
            checkpoint.SafetensorsWeights(folder),
            device=device,
            dtype=dtype,
            tokenizer=checkpoint.open_tokenizer(folder),
            stop_tokens=checkpoint.stop_tokens(folder, config),
            block_size=block_size,
            num_blocks=num_blocks,
            cache_gb=cache_gb,
            packed_folder=folder.resolve() / ".modeltorch" if cache_packed else None,
        )
        model.init_ascend_weight()
        model.ascend_weight = []
        return model

    # ---- the helpers of a step ------------------------------------------------------------------------------

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

    def warm_up(self, batch_sizes: Sequence[int] = (), prompt_lengths: Sequence[int] = ()) -> None:
        """Runs steps of these sizes that leave the cache as it is, so that later ones set nothing up.

        On a GPU the first step of a size loads kernels, measures which are the fastest and captures a graph.

        Args:
            batch_sizes: decode steps of so many sequences.
            prompt_lengths: prefills of one prompt of so many tokens.

        Raises:
            ValueError: a size that is not a whole number of at least 1.
        """
        if any(operator.index(size) < 1 for size in (*batch_sizes, *prompt_lengths)):
            raise ValueError(f"sizes must be at least 1, got {[*batch_sizes, *prompt_lengths]}")
        width = -(-self.max_positions // self.cache.block_size)
        with self._lock:
            for is_prefill, sizes in ((False, batch_sizes), (True, prompt_lengths)):
                for size in sizes:
                    sequences = 1 if is_prefill else size
                    zeros = torch.zeros(size, dtype=torch.int64, device=self.device)
                    lengths = [size] if is_prefill else [1] * size
                    arguments = (
                        zeros,
                        zeros,
                        is_prefill,
                        self.cache.pairs,
                        torch.zeros(sequences, min(width, self.cache.num_blocks), dtype=torch.int32),
                        zeros - 1,
                        torch.tensor(lengths, dtype=torch.int32),
                        max(lengths),
                        zeros[:1] if is_prefill else None,
                    )
                    for _ in range(2):
                        self.forward(*arguments)

    # ---- whole answers --------------------------------------------------------------------------------------

    @property
    def cache(self) -> PagedCache:
        """The paged cache, made at first use with the sizes given to __init__."""
        if self._cache is None:
            sizes: dict[str, Any] = {
                "num_layers": self.num_layers,
                "block_size": self._cache_options["block_size"],
                "kv_heads": self.num_kv_heads,
                "head_size": self.head_size,
                "dtype": self.dtype,
            }
            blocks = self._cache_options["num_blocks"]
            if blocks is None:
                blocks = PagedCache.blocks_for_memory(
                    self._cache_options["cache_gb"], free_memory=free_memory(self.device), **sizes
                )
            self._cache = PagedCache(num_blocks=int(blocks), device=self.device, **sizes)
        return self._cache

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt; a token list is returned as it is.

        Raises:
            ValueError: text without a tokenizer.
        """
        if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
            raise TypeError(f"a prompt must be text or a list of token ids, got {type(prompt).__name__}")
        if not isinstance(prompt, str):
            tokens = list(prompt)
            try:
                return list(map(operator.index, tokens))
            except TypeError:
                return [_token_id(token) for token in tokens]  # names the one that is wrong
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a prompt must be whole Unicode text, got {prompt!r}") from error
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer: pass lists of token ids instead of text")
        return list(self.tokenizer(prompt)["input_ids"])

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        ignore_eos: bool = False,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> list[Generation]:
        """Answers prompts with continuous batching: requests enter and leave the batch between steps.

        Args:
            prompts: texts or lists of token ids; a single text is a list of one.
            max_new_tokens: most tokens of an answer; None: 256, or what the model's positions and the cache leave.
            ignore_eos: go on to max_new_tokens.
            temperature: 0 is greedy; otherwise tokens are drawn from softmax(logits / temperature).
            top_k: draw among the k most probable tokens only; 0: among all.
            top_p: draw among the most probable tokens that together reach this probability, after top_k.
            seed: each prompt draws from the sequence of this seed, so an answer does not depend on what else is in
                the batch; None: torch's generator draws.

        Returns:
            One Generation a prompt, in order.

        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, a number out of range, or a request that can
                never fit the positions of the model or the cache. Nothing has run then.
        """
        given: Sequence[str] | Sequence[Sequence[int]] = [prompts] if isinstance(prompts, (str, bytes)) else prompts
        requests = [
            Request(self.encode(prompt), max_new_tokens, ignore_eos, Sampling(temperature, top_k, top_p, seed))
            for prompt in given
        ]
        with self._lock:
            return Engine(self).run(requests)

    def compute_logits(self, token_lists: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Logits of every position, through the paged path.

        Args:
            token_lists: sequences of token ids, none empty.

        Returns:
            A float32 tensor [len, vocab] a sequence, on the model's device, but on the host for npu.

        Raises:
            ValueError: as generate.
        """
        sequences = [self.encode(tokens) for tokens in token_lists]
        with self._lock:
            return Engine(self).compute_logits(sequences)

    def _is_tied(self) -> bool:
        """Whether the head is the embedding; a head of its own in the file counts, as transformers 5 has it."""
        head = self._weights.get("lm_head.weight")
        return bool(self.config.tie_word_embeddings) and (
            head is None or torch.equal(head, self._weights["model.embed_tokens.weight"])
        )


def _token_id(token: Any) -> int:
    try:
        return operator.index(token)
    except TypeError:
        raise TypeError(f"token ids must be whole numbers, got {token!r}") from None
