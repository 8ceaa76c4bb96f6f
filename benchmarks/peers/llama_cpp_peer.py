"""llama.cpp through its library, built on this machine: batches of sequences, requests as one such batch."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy
from harness import Peer, main


def _safetensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Names and uint16 views of the bfloat16 tensors of a file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    data = numpy.memmap(path, dtype=numpy.uint8, mode="r", offset=8 + size)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        yield name, data[begin:end].view(numpy.uint16).reshape(entry["shape"])


class LlamaCpp(Peer):
    """A GGUF file with bfloat16 matrices; vectors are float32, as its own converter writes them."""

    version = f"llama-cpp-python {llama_cpp.__version__}"

    @classmethod
    def convert(cls, checkpoint: Path, converted: Path, dtype: str) -> None:
        """Writes model.gguf; its own converter knows no tokenizer of numbered words."""
        config = json.loads((checkpoint / "config.json").read_text())
        writer = gguf.GGUFWriter(converted / "model.gguf", "qwen2")
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_rope_freq_base(config["rope_theta"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
        words = [f"t{token}" for token in range(config["vocab_size"])]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(words)
        writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
        writer.add_token_merges(["t 0"])
        writer.add_eos_token_id(config["eos_token_id"])
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
        for name, bits in _safetensors(checkpoint / "model.safetensors"):
            known = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if bits.ndim == 1:
                writer.add_tensor(known, (bits.astype(numpy.uint32) << 16).view(numpy.float32))
            else:
                writer.add_tensor(known, bits.view(numpy.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def __init__(self, checkpoint: Path, converted: Path, dtype: str, threads: int) -> None:
        """Maps the file."""
        llama_cpp.llama_backend_init()
        path = str(converted / "model.gguf").encode()
        self.model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.threads = threads

    @contextmanager
    def _context(self, prompts: list[list[int]], new_tokens: int) -> Iterator[Any]:
        """A cache with room for all sequences."""
        options = llama_cpp.llama_context_default_params()
        options.n_seq_max = len(prompts)
        options.n_ctx = len(prompts) * (max(map(len, prompts)) + new_tokens)
        options.n_batch = max(2048, sum(map(len, prompts)))
        options.n_threads = options.n_threads_batch = self.threads
        context = llama_cpp.llama_init_from_model(self.model, options)
        if not context:
            raise RuntimeError("llama_init_from_model made no context")
        try:
            yield context
        finally:
            llama_cpp.llama_free(context)

    def _step(self, context: Any, tokens: list[list[int]], positions: list[int]) -> list[int]:
        """Adds tokens to each sequence, the first of them at its position, in one call; the next of each, greedily."""
        total = sum(map(len, tokens))
        batch = llama_cpp.llama_batch_init(total, 0, 1)
        row, lasts = 0, []
        for sequence, (added, position) in enumerate(zip(tokens, positions, strict=True)):
            for offset, token in enumerate(added):
                batch.token[row], batch.pos[row] = token, position + offset
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
                batch.logits[row] = offset == len(added) - 1
                row += 1
            lasts.append(row - 1)
        batch.n_tokens = total
        code = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        rows = (llama_cpp.llama_get_logits_ith(context, last) for last in lasts)
        return [int(numpy.ctypeslib.as_array(logits, (self.vocab_size,)).argmax()) for logits in rows]

    def _steps(self, context: Any, prompts: list[list[int]], new_tokens: int) -> list[float]:
        """Times of the prefill and of each step after it."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        times, tokens, positions = [], prompts, [0] * len(prompts)
        for _ in range(new_tokens):
            start = time.perf_counter()
            chosen = self._step(context, tokens, positions)
            times.append(time.perf_counter() - start)
            positions = [position + len(added) for position, added in zip(positions, tokens, strict=True)]
            tokens = [[token] for token in chosen]
        return times

    def prefill(self, prompt: list[int], runs: int) -> list[float]:
        """One call with the prompt."""
        with self._context([prompt], 1) as context:
            return [self._steps(context, [prompt], 1)[0] for _ in range(runs + 1)][1:]

    def decode(self, prompts: list[list[int]], warm_up: int, steps: int) -> list[float]:
        """Calls with one token a sequence."""
        with self._context(prompts, 1 + warm_up + steps) as context:
            return self._steps(context, prompts, 1 + warm_up + steps)[1 + warm_up :]

    def serve(self, prompts: list[list[int]], new_tokens: int) -> float:
        """One call with all prompts, which the library splits, then calls with one token a request."""
        with self._context(prompts, new_tokens) as context:
            return sum(self._steps(context, prompts, new_tokens))


if __name__ == "__main__":
    main(LlamaCpp, __doc__)
