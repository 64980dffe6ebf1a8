"""The denoiser of `diffmm.models` written in PyTorch, for side-by-side measurement.

Same shapes, same operations, PyTorch's own fused kernels wherever it has them
(`scaled_dot_product_attention`, `rms_norm`, `cross_entropy`, fused AdamW).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from diffmm.models import TransformerConfig


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``[B, H, L, K]``, pairs (i, i + K/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class TorchBlock(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: TransformerConfig) -> None:
        """Kernels are fused where a PyTorch user would fuse them (QKV, gate-up)."""
        super().__init__()
        width = config.width
        self.heads, self.head_dim = width // config.head_dim, config.head_dim
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = nn.RMSNorm(config.head_dim, eps=1e-6)
        self.key_norm = nn.RMSNorm(config.head_dim, eps=1e-6)
        self.output = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.gate_up = nn.Linear(width, 2 * config.mlp_hidden, bias=False)
        self.down = nn.Linear(config.mlp_hidden, width, bias=False)

    def forward(self, x, cos, sin, mask):
        """``[B, L, D]`` to ``[B, L, D]``."""
        rows, length, width = x.shape
        shape = (rows, length, 3, self.heads, self.head_dim)
        query, key, value = (
            self.qkv(self.attention_norm(x)).view(shape).permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(
            rotate(self.query_norm(query), cos, sin),
            rotate(self.key_norm(key), cos, sin),
            value,
            attn_mask=mask,
        )
        x = x + self.output(mixed.transpose(1, 2).reshape(rows, length, width))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class TorchDenoiser(nn.Module):
    """Bidirectional denoiser with untied embeddings."""

    def __init__(self, config: TransformerConfig) -> None:
        """See `TransformerConfig`."""
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.blocks = nn.ModuleList(
            TorchBlock(config) for _ in range(config.num_layers)
        )
        self.final_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.unembedding = nn.Linear(config.width, config.vocabulary_size, bias=False)

    def forward(self, tokens, positions, segment_ids):
        """Logits ``[B, L, V]``."""
        half = self.config.head_dim // 2
        frequency = self.config.rope_base ** (-torch.arange(half) / half)
        angle = positions[:, None, :, None].float() * frequency
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, angle.cos(), angle.sin(), mask)
        return self.unembedding(self.final_norm(x))


class TorchTrainer:
    """Linear-schedule masked diffusion with AdamW and clipping, one step a call."""

    def __init__(
        self, config: TransformerConfig, mask_id: int, learning_rate: float
    ) -> None:
        """Builds model and optimiser."""
        self.model = TorchDenoiser(config)
        self.mask_id = mask_id
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            fused=True,
        )

    def step(self, tokens, positions, segment_ids, maskable) -> float:
        """One optimiser step on a batch of int64 tensors ``[B, L]``."""
        rows = tokens.shape[0]
        u = torch.rand(())
        t = 1e-3 + (1 - 1e-3) * ((u + torch.arange(rows) / rows) % 1.0)
        masked = maskable & (torch.rand(tokens.shape) < t[:, None])
        corrupted = torch.where(masked, self.mask_id, tokens)
        logits = self.model(corrupted, positions, segment_ids)
        nll = F.cross_entropy(
            logits.flatten(0, 1), tokens.flatten(), reduction="none"
        ).view(tokens.shape)
        loss = (nll * masked / t[:, None]).sum() / maskable.sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()
