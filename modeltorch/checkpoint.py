"""Opens Hugging Face checkpoints: configuration, weights, tokenizer.

Needs the extra [hf]: transformers, safetensors, huggingface_hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from modeltorch.configuration import check_config

BUNDLED = Path(__file__).parent / "checkpoints" / "arithmetic"
"""The small checkpoint that ships with the package."""

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")
_TOKENIZER_FILES = (*_TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def _missing_extra(error: ImportError) -> ImportError:
    return ImportError(f"checkpoints need the extra [hf] ({error.name} is missing): pip install 'modeltorch[hf]'")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _shown(value: Any) -> str:
    """A value of a file as its JSON, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _reason(error: Exception) -> str:
    """What another library says, on one line: the error that it began with, and its type where that says more."""
    first = error.__cause__ or error
    said = " ".join(str(first).split())
    if isinstance(first, (ValueError, TypeError)) and said:
        return said
    return f"{type(first).__name__}: {said}"


def resolve(path_or_hub_id: str | Path) -> Path:
    """The folder of a checkpoint: a local one as it is, a hub id after downloading what is missing.

    Raises:
        FileNotFoundError: neither a folder nor a hub repository that can be reached.
    """
    name = str(path_or_hub_id)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if not name or folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"a checkpoint is a folder or a hub id (owner/name), got {name!r}, which is neither")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise _missing_extra(error) from error
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:  # the hub client raises many types, all of which mean that there is no such model here
        raise FileNotFoundError(f"{name} is no folder, and the hub did not give it: {error}") from error


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of each tensor.

    Raises:
        ValueError: the index does not say.
    """
    files = _read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index} must have a weight_map of tensor names to file names, got {_shown(files)}")
    for name, shard in files.items():
        if not isinstance(shard, str) or not shard:
            raise ValueError(f"{index} must place {name} in a file by its name, got {_shown(shard)}")
    return files


class SafetensorsWeights(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint by name, memory-mapped: reading one costs nothing until it is touched.

    Single (model.safetensors) and sharded (model.safetensors.index.json) checkpoints look the same.

    Raises:
        FileNotFoundError: the folder holds neither, or a shard is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, Any] = {}
        self._files: dict[str, str]
        if (folder / _INDEX).exists():
            self._files = _weight_map(folder / _INDEX)
        elif (folder / _SINGLE).exists():
            self._files = dict.fromkeys(self._shard(_SINGLE).keys(), _SINGLE)
        else:
            raise FileNotFoundError(f"{folder} holds neither {_SINGLE} nor {_INDEX}")
        for shard in sorted(set(self._files.values())):
            if not (folder / shard).exists():
                raise FileNotFoundError(f"{folder} lacks the shard {shard} that its index names")
            names = {name for name, place in self._files.items() if place == shard}
            lacking = names - set(self._shard(shard).keys())
            if lacking:
                raise ValueError(f"{folder / shard} lacks {min(lacking)}, which the index places there")

    def _shard(self, name: str) -> Any:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise _missing_extra(error) from error
        if name not in self._open:
            try:
                self._open[name] = safe_open(self._folder / name, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{self._folder / name} is no whole safetensors file: {error}") from error
        return self._open[name]

    def close(self) -> None:
        """Lets go of the files; a tensor that is read later opens its file again."""
        self._open = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._shard(self._files[name]).get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def open_config(folder: Path) -> Any:
    """The transformers configuration of a checkpoint.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: one of its values cannot be.
        NotImplementedError: an architecture or a feature that is not built.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise _missing_extra(error) from error
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no config.json")
    model_type = _read_json(path).get("model_type")
    if model_type is None:
        raise ValueError(f"{path} has no model_type")
    if model_type != "qwen2":
        raise NotImplementedError(f"{path}: model_type must be qwen2, got {model_type}: others are not built")
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers checks some values, with errors of many types
        raise ValueError(f"{path} is no valid Qwen2 configuration: {_reason(error)}") from error
    try:
        check_config(config)
    except NotImplementedError as error:
        raise NotImplementedError(f"{path}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def open_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of a checkpoint, or None if it ships none.

    Raises:
        ValueError: its files are damaged.
    """
    from transformers import AutoTokenizer

    present = [folder / name for name in _TOKENIZER_FILES if (folder / name).exists()]
    if not any(path.name in _TOKENIZERS for path in present):
        return None
    for path in present:
        if path.suffix == ".json":
            _read_json(path)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a damaged file is a KeyError, a TypeError, or whatever the parser met first
        beside = f" (beside it: {', '.join(path.name for path in present[1:])})" if present[1:] else ""
        raise ValueError(
            f"{present[0]} must be a tokenizer that transformers can read{beside}: {_reason(error)}"
        ) from error


def stop_tokens(folder: Path, config: Any) -> frozenset[int]:
    """The ids that end an answer: eos_token_id of generation_config.json, else of config.json; may be empty.

    Raises:
        ValueError: they are no token ids.
    """
    path = folder / "config.json"
    eos = getattr(config, "eos_token_id", None)
    generation = folder / "generation_config.json"
    if generation.exists():
        content = _read_json(generation)
        if "eos_token_id" in content:
            path, eos = generation, content["eos_token_id"]
    if eos is None:
        return frozenset()
    ids = eos if isinstance(eos, list) else [eos]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < config.vocab_size:
            raise ValueError(
                f"{path}: eos_token_id must be a token id in [0, {config.vocab_size}) or a list of them, "
                f"got {_shown(eos)}"
            )
    return frozenset(ids)
