"""Qwen2 checkpoints and whole answers: from_pretrained, generate and compute_logits need no knowledge of steps."""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from modeltorch import checkpoint
from modeltorch.engine import Engine, Generation, Request
from modeltorch.paged_cache import DEFAULT_BLOCK_SIZE, PagedCache, free_memory
from modeltorch.qwen2_steps import Qwen2Steps
from modeltorch.sampling import Sampling


class FlashQwen2ForCausalLM(Qwen2Steps):
    """Qwen2 and Qwen2.5 with paged attention.

    Its steps, and the helpers that callers of the Ascend front ends know, are those of Qwen2Steps. from_pretrained
    drops ascend_weight, since the objects hold what they need, packed where that is faster.
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
        PagedCache.check_sizes(block_size=block_size, num_blocks=num_blocks, cache_gb=cache_gb)
        super().__init__(config, weights, device=device, dtype=dtype, packed_folder=packed_folder)
        self.tokenizer = tokenizer
        self.stop_tokens = stop_tokens
        self._cache_options = {"block_size": block_size, "num_blocks": num_blocks, "cache_gb": cache_gb}
        self._cache: PagedCache | None = None
        self._lock = threading.RLock()

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


def _token_id(token: Any) -> int:
    try:
        return operator.index(token)
    except TypeError:
        raise TypeError(f"token ids must be whole numbers, got {token!r}") from None
