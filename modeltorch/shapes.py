"""Model shapes for benchmarks: real sizes, random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Qwen2Shape:
    """The sizes of a Qwen2 model, under the names of a Hugging Face configuration."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    eos_token_id: int | None = None

    def random_weights(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Mapping[str, torch.Tensor]:
        """Weights of this shape under their checkpoint names: normal, deviation 0.02, from torch's generator."""
        head_size = self.hidden_size // self.num_attention_heads
        kv_size = self.num_key_value_heads * head_size
        hidden, inter = self.hidden_size, self.intermediate_size

        def normal(*sizes: int) -> torch.Tensor:
            return torch.empty(sizes, dtype=dtype, device=device).normal_(0.0, 0.02)

        weights = {
            "model.embed_tokens.weight": normal(self.vocab_size, hidden),
            "model.norm.weight": torch.ones(hidden, dtype=dtype, device=device),
        }
        if not self.tie_word_embeddings:
            weights["lm_head.weight"] = normal(self.vocab_size, hidden)
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                weights[f"{prefix}{norm}.weight"] = torch.ones(hidden, dtype=dtype, device=device)
            for name, size in (("q", hidden), ("k", kv_size), ("v", kv_size)):
                weights[f"{prefix}self_attn.{name}_proj.weight"] = normal(size, hidden)
                weights[f"{prefix}self_attn.{name}_proj.bias"] = normal(size)
            weights[f"{prefix}self_attn.o_proj.weight"] = normal(hidden, hidden)
            weights[f"{prefix}mlp.gate_proj.weight"] = normal(inter, hidden)
            weights[f"{prefix}mlp.up_proj.weight"] = normal(inter, hidden)
            weights[f"{prefix}mlp.down_proj.weight"] = normal(hidden, inter)
        return weights


SHAPES = {
    "qwen2.5-0.5b": Qwen2Shape(151936, 896, 4864, 24, 14, 2, True),
    "qwen2.5-1.5b": Qwen2Shape(151936, 1536, 8960, 28, 12, 2, True),
    "qwen2.5-7b": Qwen2Shape(152064, 3584, 18944, 28, 28, 4, False),
}
"""The dense Qwen2.5 shapes that `modeltorch bench --shape` takes."""
