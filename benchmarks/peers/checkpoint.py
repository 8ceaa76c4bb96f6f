"""Writes the checkpoint that all engines read: a known shape, random bfloat16 weights, a tokenizer of numbered words.

python benchmarks/peers/checkpoint.py SHAPE FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from modeltorch.shapes import SHAPES

_END = 151643  # where Qwen2.5 has its end of text; the measurements ignore it


def write(shape_name: str, folder: Path) -> None:
    """Writes config.json, model.safetensors and the tokenizer, the weights as `modeltorch bench --shape` draws them."""
    shape = SHAPES[shape_name]
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **dataclasses.asdict(shape),
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "bos_token_id": _END,
        "eos_token_id": _END,
        "pad_token_id": _END,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    words = {f"t{token}": token for token in range(shape.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=f"t{_END}"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = {f"{name}_token": f"t{_END}" for name in ("bos", "eos", "pad", "unk")}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **ends}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    torch.manual_seed(0)
    weights = dict(shape.random_weights(torch.bfloat16))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
