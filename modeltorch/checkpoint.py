"""Opens Hugging Face checkpoints: configuration, weights, tokenizer.

Needs the extra [hf]: transformers, safetensors, huggingface_hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

BUNDLED = Path(__file__).parent / "checkpoints" / "arithmetic"
"""The small checkpoint that ships with the package."""

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def _missing_extra(error: ImportError) -> ImportError:
    return ImportError(f"checkpoints need the extra [hf] ({error.name} is missing): pip install 'modeltorch[hf]'")


def resolve(path_or_hub_id: str | Path) -> Path:
    """The folder of a checkpoint: a local one as it is, a hub id after downloading what is missing.

    Raises:
        FileNotFoundError: neither a folder nor a hub repository that can be reached.
    """
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_hub_id)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"a checkpoint is a folder or a hub id (owner/name), got {name}, which is neither")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise _missing_extra(error) from error
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:  # the hub client raises many types, all of which mean that there is no such model here
        raise FileNotFoundError(f"{name} is no folder, and the hub did not give it: {error}") from error


class SafetensorsWeights(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint by name, memory-mapped: reading one costs nothing until it is touched.

    Single (model.safetensors) and sharded (model.safetensors.index.json) checkpoints look the same.

    Raises:
        FileNotFoundError: the folder holds neither, or a shard is missing.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise _missing_extra(error) from error
        if (folder / _INDEX).exists():
            files: dict[str, str] = json.loads((folder / _INDEX).read_text())["weight_map"]
        elif (folder / _SINGLE).exists():
            with safe_open(folder / _SINGLE, framework="pt") as single:
                files = dict.fromkeys(single.keys(), _SINGLE)
        else:
            raise FileNotFoundError(f"{folder} holds neither {_SINGLE} nor {_INDEX}")
        for shard in sorted(set(files.values())):
            if not (folder / shard).exists():
                raise FileNotFoundError(f"{folder} lacks the shard {shard} that its index names")
        self._files = files
        self._open = {name: safe_open(folder / name, framework="pt") for name in sorted(set(files.values()))}

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._open[self._files[name]].get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def open_config(folder: Path) -> Any:
    """The transformers configuration of a checkpoint.

    Raises:
        FileNotFoundError: there is no config.json.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise _missing_extra(error) from error
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds no config.json")
    return AutoConfig.from_pretrained(folder)


def open_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of a checkpoint, or None if it ships none."""
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        return None
    return AutoTokenizer.from_pretrained(folder)


def stop_tokens(folder: Path, config: Any) -> frozenset[int]:
    """The ids that end an answer: eos_token_id of generation_config.json, else of config.json; may be empty."""
    eos = getattr(config, "eos_token_id", None)
    path = folder / "generation_config.json"
    if path.exists():
        eos = json.loads(path.read_text()).get("eos_token_id", eos)
    if eos is None:
        return frozenset()
    return frozenset(eos if isinstance(eos, list) else [eos])
