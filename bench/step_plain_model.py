"""Qwen3 as one would write it in nanoGPT's manner: plain PyTorch, causal attention over the row, all logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_config import ModelArchitectureConfig

# B rows, T tokens, V vocabulary, D width, H query heads, G key heads, C head size. Names are Hugging Face's.


class PlainModel(nn.Module):
    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.n_embd),
                "layers": nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer)),
                "norm": nn.RMSNorm(config.n_embd, config.norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.weight_tying:
            self.lm_head.weight = self.model["embed_tokens"].weight
        self.head_size, self.theta = config.head_size, config.rope_theta

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) for ids (B, T)."""
        x = self.model["embed_tokens"](ids)
        exponents = torch.arange(0, self.head_size, 2, device=ids.device, dtype=torch.float32) / self.head_size
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None] * self.theta**-exponents  # (T, C / 2)
        rotary = angles.cos(), angles.sin()
        for layer in self.model["layers"]:
            x = layer(x, rotary)
        return self.lm_head(self.model["norm"](x))


class PlainBlock(nn.Module):
    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = PlainAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = PlainFeedForward(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


class PlainAttention(nn.Module):
    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()
        D, C = config.n_embd, config.head_size
        self.q_proj = nn.Linear(D, config.n_head * C, bias=False)
        self.k_proj = nn.Linear(D, config.key_heads * C, bias=False)
        self.v_proj = nn.Linear(D, config.key_heads * C, bias=False)
        self.o_proj = nn.Linear(config.n_head * C, D, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(C, config.norm_eps), nn.RMSNorm(C, config.norm_eps)
        self.head_size = C

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (part(x).view(B, T, -1, self.head_size) for part in (self.q_proj, self.k_proj, self.v_proj))
        q, k = turned(self.q_norm(q), rotary), turned(self.k_norm(k), rotary)
        q, k, v = (part.transpose(1, 2) for part in (q, k.to(q.dtype), v.to(q.dtype)))  # (B, H or G, T, C)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(B, T, -1))


class PlainFeedForward(nn.Module):
    def __init__(self, config: ModelArchitectureConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.ffn_width, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.ffn_width, bias=False)
        self.down_proj = nn.Linear(config.ffn_width, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def turned(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, T, heads, C) with its pairs (i, i + C / 2) turned by the angles of their positions."""
    cos, sin = (part[:, None].to(x.dtype) for part in rotary)  # (T, 1, C / 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
