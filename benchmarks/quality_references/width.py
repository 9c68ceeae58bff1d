"""An eighth of the hidden width, the same indices everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from quality_references.registry import reference
from quality_references.structures import narrow_columns, narrow_rows
from quality_references.walk import LayerWalk, accumulate_gradients

__all__ = ["FRACTION", "kept_width", "parameters_after_indices"]

FRACTION = 0.125


def kept_width(model: Any) -> int:
    """Hidden width that stays."""
    return round(model.config.hidden_size * (1 - FRACTION))


def _readers(layer: Any) -> tuple[nn.Linear, ...]:
    """Linears whose columns are the hidden width."""
    return (*_attention_readers(layer), layer.mlp.gate_proj, layer.mlp.up_proj)


def _attention_readers(layer: Any) -> tuple[nn.Linear, ...]:
    return (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)


def _norms(model: Any) -> list[Any]:
    inner = [n for layer in model.model.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
    return [*inner, model.model.norm]


def _coupled(model: Any) -> Iterator[tuple[nn.Parameter, int]]:
    """Every parameter with a hidden dimension, and which one it is; a tied head appears once."""
    yield model.model.embed_tokens.weight, 1
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        yield model.lm_head.weight, 1
    for norm in _norms(model):
        yield norm.weight, 0
    for layer in model.model.layers:
        for linear in _readers(layer):
            yield linear.weight, 1
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            yield linear.weight, 0


def _sum_to(entries: torch.Tensor, dim: int) -> torch.Tensor:
    return entries if entries.dim() == 1 else entries.sum(1 - dim)


def _keep(model: Any, scores: torch.Tensor) -> None:
    kept = scores.argsort(descending=True, stable=True)[: kept_width(model)].sort().values
    embedding, tied = model.model.embed_tokens, model.lm_head.weight is model.model.embed_tokens.weight
    embedding.weight = nn.Parameter(embedding.weight.detach()[:, kept].clone())
    embedding.embedding_dim = len(kept)
    narrow_columns(model.lm_head, kept)
    if tied:
        model.lm_head.weight = embedding.weight
    for norm in _norms(model):
        norm.weight = nn.Parameter(norm.weight.detach()[kept].clone())
    for layer in model.model.layers:
        for linear in _readers(layer):
            narrow_columns(linear, kept)
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            narrow_rows(linear, kept)
    model.config.hidden_size = len(kept)


def parameters_after_indices(model: Any) -> int:
    """Parameters of ``model`` when only ``kept_width`` hidden indices stay."""
    width = model.config.hidden_size
    inside = sum(parameter.numel() for parameter, _ in _coupled(model))
    return sum(p.numel() for p in model.parameters()) - inside // width * (width - kept_width(model))


@reference("width", "width12-magnitude", "group norm, DepGraph 2301.12900")
def magnitude(model: Any, windows: torch.Tensor) -> None:
    """Squares of an index's weights in every matrix that has it."""
    _keep(model, sum(_sum_to(p.detach().square(), dim) for p, dim in _coupled(model)))


@reference("width", "width12-taylor", "LLM-Pruner 2305.11627")
def taylor(model: Any, windows: torch.Tensor) -> None:
    """``sum |w dL/dw|`` over every weight of an index (Ma et al. 2023, channel-wise)."""
    accumulate_gradients(model, windows)
    _keep(model, sum(_sum_to((p.detach() * p.grad).abs(), dim) for p, dim in _coupled(model)))
    model.zero_grad()


def activation(model: Any, windows: torch.Tensor, *, square: bool) -> None:
    """An index's size in the outputs of all norms, summed over norms (Minitron, Muralidharan et al. 2024, 2407.14679): the
    mean of ``|x|`` over tokens, or its root mean square.
    """
    walk, scores = LayerWalk(model, windows), torch.zeros(model.config.hidden_size, dtype=torch.float64)
    for layer in model.model.layers:
        for moments in walk.observe(layer, (layer.self_attn.q_proj, layer.mlp.gate_proj)):
            scores += moments.norms / moments.tokens**0.5 if square else moments.absolute / moments.tokens
        walk.advance(layer)
    with torch.no_grad():
        last = model.model.norm(torch.cat(walk.hidden)).flatten(0, 1).double()
    scores += last.square().mean(0).sqrt() if square else last.abs().mean(0)
    _keep(model, scores)


reference("width", "width12-minitron", "Minitron 2407.14679, mean")(partial(activation, square=False))
reference("width", "width12-minitron-l2", "Minitron 2407.14679, L2")(partial(activation, square=True))
