"""Refuses configurations that no model can be built from, before anything is."""

from __future__ import annotations

import sys
from typing import Any, TypeGuard

import torch

from modeltorch.paged_cache import GIB, available_memory

_MANY = 2**31 - 1
_LARGEST = {  # for layers and heads what the step objects take (csrc/models/decoder_parameters.cpp)
    "vocab_size": _MANY,
    "hidden_size": _MANY,
    "intermediate_size": _MANY,
    "max_position_embeddings": _MANY,
    "num_hidden_layers": 1000,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 575,
}
_OPTIONAL = ("num_key_value_heads", "head_dim")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _check_sizes(config: Any) -> None:
    for name, most in _LARGEST.items():
        value = getattr(config, name, None)
        if value is None and name in _OPTIONAL:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ValueError(f"{name} must be a whole number from 1 to {most}, got {value!r}")
    heads, hidden = config.num_attention_heads, config.hidden_size
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads must be a multiple of num_key_value_heads, got {heads} and {kv_heads}")
    if getattr(config, "head_dim", None) is None and hidden % heads:
        raise ValueError(f"hidden_size must be a multiple of num_attention_heads, got {hidden} and {heads}")
    head_size = getattr(config, "head_dim", None) or hidden // heads
    if head_size % 2:
        raise ValueError(f"the size of a head must be even, got {head_size}")
    needed = config.max_position_embeddings * head_size * 16  # cosine and sine while they are computed in float32
    if needed > available_memory():
        raise ValueError(
            f"max_position_embeddings is {config.max_position_embeddings}: the position tables need "
            f"{needed / GIB:.1f} GiB, and {available_memory() / GIB:.1f} GiB are free; lower it"
        )


def rope_settings(config: Any) -> tuple[float, float]:
    """The base of the rotary embedding, and the factor that linear scaling divides the positions by (1 without).

    Args:
        config: a Qwen2 configuration; `rope_theta` and scaling are read in the old and the new spelling.

    Raises:
        NotImplementedError: rope scaling other than linear.
        ValueError: a value that is not a number, or out of range.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters must be an object, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        raise NotImplementedError(f"rope scaling must be default or linear, got {kind}: others are not built")
    theta = rope.get("rope_theta", getattr(config, "rope_theta", None))
    theta = 10000.0 if theta is None else theta
    if not _is_number(theta) or theta <= 0:
        raise ValueError(f"rope_theta must be a positive number, got {theta!r}")
    factor = rope.get("factor") if kind == "linear" else 1.0
    if not _is_number(factor) or factor < 1:
        raise ValueError(f"linear rope scaling needs a factor of at least 1, got {factor!r}")
    return float(theta), float(factor)


def check_config(config: Any) -> None:
    """Refuses what is not built, and values that contradict each other.

    Args:
        config: a transformers Qwen2Config, or anything with its attributes.

    Raises:
        NotImplementedError: an architecture or a feature that is not built.
        ValueError: a value that is out of range, of the wrong kind, or unlike another.
    """
    model_type = getattr(config, "model_type", "qwen2")
    if model_type != "qwen2":
        raise NotImplementedError(f"model_type must be qwen2, got {model_type}: other architectures are not built")
    if getattr(config, "use_sliding_window", False):
        raise NotImplementedError("use_sliding_window is true, which is not built; only full attention is")
    activation = getattr(config, "hidden_act", "silu")
    if activation != "silu":
        raise NotImplementedError(f"hidden_act must be silu, got {activation}: others are not built")
    _check_sizes(config)
    epsilon = getattr(config, "rms_norm_eps", None)
    if not _is_number(epsilon) or not 0 < epsilon < 1:
        raise ValueError(f"rms_norm_eps must be a number above 0 and below 1, got {epsilon!r}")
    rope_settings(config)


def rope_tables(config: Any, head_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every position, the two halves of a row being equal (docs/contract.md, "Inputs").

    Args:
        config: a Qwen2 configuration; `rope_theta` and scaling are read in the old and the new spelling.
        head_size: the size of a head, even.
        dtype: the dtype of the result; the tables are computed in float32.

    Returns:
        cos and sin, both [max_position_embeddings, head_size].

    Raises:
        NotImplementedError: rope scaling other than linear.
        ValueError: a value that is not a number, or out of range.
    """
    theta, factor = rope_settings(config)
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    inv_freq = (1.0 / theta**exponents) / factor
    angles = torch.arange(config.max_position_embeddings, dtype=torch.float32).unsqueeze(1) * inv_freq
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
