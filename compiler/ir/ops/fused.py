"""Operators that stand for a raised pattern. Backends map each to one runtime kernel; torch runs the reference below."""

from __future__ import annotations

import torch
from torch.library import custom_op

__all__ = ["cached_attention", "residual_rms_norm", "rms_norm"]


@custom_op("compile_sparse::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2, -1) + eps) * weight`` over the last dimension (arXiv:1910.07467)."""
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


@rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.empty_like(x)


@custom_op("compile_sparse::residual_rms_norm", mutates_args=())
def residual_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rms_norm(x + residual), x + residual)``."""
    total = x + residual
    return torch.nn.functional.rms_norm(total, (total.shape[-1],), weight, eps), total


@residual_rms_norm.register_fake
def _(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@custom_op("compile_sparse::cached_attention", mutates_args=())
def cached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    attention_mask: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    num_heads: int,
    kv_heads: int,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal grouped-query attention with a key-value cache and optional rotary embedding.

    Query position s of row b is ``past + s``; it sees cached and new positions up to itself (the last ``window`` of them when
    ``window > 0``) that ``attention_mask`` keeps. Padding is on the right: a row's valid positions are a prefix.

    Args:
        query: ``[B, S, num_heads * D]``; key, value: ``[B, S, kv_heads * D]`` (value may have its own D).
        past_key, past_value: ``[B, kv_heads, P, D]``.
        attention_mask: int64 ``[B, P + S]``, 1 for valid positions.
        cos, sin: float ``[max_positions, D / 2]`` tables for the rotate-half form, or None when no rotation is applied here.
        scale: multiplies the logits before softmax.
        window: sliding-window length, 0 for none.

    Returns:
        ``(output [B, S, num_heads * Dv], key cache [B, kv_heads, P + S, D], value cache [B, kv_heads, P + S, Dv])``.
    """
    batch, length = query.shape[:2]
    past = past_key.shape[2]

    def split(x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.reshape(batch, length, heads, -1).transpose(1, 2)

    q, k, v = split(query, num_heads), split(key, kv_heads), split(value, kv_heads)
    if cos is not None and sin is not None:
        c = torch.cat([cos, cos], -1)[past : past + length]
        s = torch.cat([sin, sin], -1)[past : past + length]
        half = q.shape[-1] // 2

        def rotate(x: torch.Tensor) -> torch.Tensor:
            return x * c + torch.cat([-x[..., half:], x[..., :half]], -1) * s

        q, k = rotate(q), rotate(k)
    keys, values = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    rows = torch.arange(past, past + length)[:, None]
    columns = torch.arange(past + length)[None, :]
    seen = columns <= rows
    if window > 0:
        seen = seen & (columns > rows - window)
    # A padded query row may see nothing; let it see itself so that softmax stays finite (its output is never read).
    allowed = (seen[None, None] & attention_mask[:, None, None, :].bool()) | (columns == rows)[None, None]
    out = torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, attn_mask=allowed, scale=scale, enable_gqa=num_heads != kv_heads
    )
    return out.transpose(1, 2).reshape(batch, length, -1), keys, values


@cached_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    attention_mask: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    num_heads: int,
    kv_heads: int,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, length = query.shape[:2]
    total = past_key.shape[2] + length
    return (
        query.new_empty(batch, length, num_heads * past_value.shape[3]),
        past_key.new_empty(batch, kv_heads, total, past_key.shape[3]),
        past_value.new_empty(batch, kv_heads, total, past_value.shape[3]),
    )
