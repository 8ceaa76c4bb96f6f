"""llama.cpp, built on this machine: llama-batched-bench for prefill and decode, llama-server for requests.

Its own benchmark leaves sampling out of the times; the other engines have theirs in.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy
from harness import Peer, main

_PROGRAMS = Path(sys.prefix) / "bin"
_SLOTS = 32


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

    version = "llama-cpp-python 0.3.36"

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
        """Notes the options; its programs map the file when they start."""
        self.options = ["--model", str(converted / "model.gguf"), "--threads", str(threads)]

    def _bench(self, prompt: list[int], batch: int, steps: int) -> list[dict[str, Any]]:
        """Runs of llama-batched-bench over prompts of these lengths."""
        lengths = ["-npp", ",".join(map(str, prompt)), "-ntg", str(steps), "-npl", str(batch)]
        room = ["--ctx-size", str(batch * (max(prompt) + steps + 256)), "--batch-size", "2048"]
        program = [str(_PROGRAMS / "llama-batched-bench"), *self.options, *lengths, *room, "--output-format", "jsonl"]
        run = subprocess.run(program, capture_output=True, text=True, check=True)
        found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"n_kv_max"')]
        if len(found) != len(prompt):
            raise RuntimeError(f"expected {len(prompt)} lines of llama-batched-bench, got {len(found)}")
        return found

    def prefill(self, prompt: list[int], runs: int) -> list[float]:
        """Times to read the prompt."""
        return [line["t_pp"] for line in self._bench([len(prompt)] * (runs + 1), 1, 1)[1:]]

    def decode(self, prompts: list[list[int]], warm_up: int, steps: int) -> list[float]:
        """The mean time of a step, which is all that it tells."""
        (line,) = self._bench([len(prompts[0]) + warm_up], len(prompts), steps)
        return [line["t_tg"] / steps]

    @contextmanager
    def _server(self, longest: int) -> Iterator[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        slots = ["--parallel", str(_SLOTS), "--ctx-size", str(_SLOTS * longest), "--port", str(port)]
        program = [str(_PROGRAMS / "llama-server"), *self.options, *slots, "--host", "127.0.0.1"]
        with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                address = f"http://127.0.0.1:{port}"
                while server.poll() is None:
                    try:
                        urllib.request.urlopen(f"{address}/health").close()
                        break
                    except OSError:
                        time.sleep(0.2)
                yield address
            finally:
                server.terminate()

    def serve(self, prompts: list[list[int]], new_tokens: int) -> float:
        """All requests in one post to llama-server."""
        options = {"n_predict": new_tokens, "ignore_eos": True, "cache_prompt": False}
        greedy = {"samplers": ["temperature"], "temperature": 0}
        body = json.dumps({"prompt": prompts, **options, **greedy}).encode()
        with self._server(max(map(len, prompts)) + new_tokens + 16) as address:
            request = urllib.request.Request(f"{address}/completion", body, {"Content-Type": "application/json"})
            start = time.perf_counter()
            with urllib.request.urlopen(request) as reply:
                answers = json.load(reply)
            seconds = time.perf_counter() - start
        answers = answers if isinstance(answers, list) else [answers]
        if [answer["tokens_predicted"] for answer in answers] != [new_tokens] * len(prompts):
            raise RuntimeError(f"an answer of llama-server has not {new_tokens} new tokens")
        return seconds


if __name__ == "__main__":
    main(LlamaCpp, __doc__)
