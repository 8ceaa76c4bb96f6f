"""Small checkpoints as transformers writes them, and ways to change them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from reference import Shape, random_model
from safetensors.torch import load_file, save_file

from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM

SINGLE = "model.safetensors"


INDEX = "model.safetensors.index.json"


def written(
    folder: Path, shape: Shape | None = None, dtype: torch.dtype = torch.float32, shard_size: str = "1GB"
) -> Path:
    """A checkpoint of a random model, as transformers saves it."""
    random_model(shape or Shape()).to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def opened(folder: Path | str, dtype: torch.dtype = torch.float32) -> FlashQwen2ForCausalLM:
    return FlashQwen2ForCausalLM.from_pretrained(folder, dtype=dtype, block_size=16, num_blocks=40)


def edit_json(path: Path, remove: tuple[str, ...] = (), **changes: object) -> None:
    content = {key: value for key, value in json.loads(path.read_text()).items() if key not in remove}
    path.write_text(json.dumps(content | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / SINGLE)
    edit(weights)
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})
