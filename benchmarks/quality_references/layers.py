"""A quarter of the decoder layers."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from quality_references.registry import reference
from quality_references.solve import damped
from quality_references.walk import LayerWalk

__all__: list[str] = []

FRACTION = 0.25
SEARCH_WINDOWS = 32
"""Calibration windows on which a candidate's loss is measured: one evaluation per candidate and step."""


def _drop(model: Any, gone: Collection[int]) -> dict[str, Any]:
    layers = [layer for index, layer in enumerate(model.model.layers) if index not in gone]
    model.model.layers = nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    return {"removed": sorted(gone)}


def _count(model: Any) -> int:
    return round(len(model.model.layers) * FRACTION)


def _states(model: Any, windows: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states ``[W, S, d]`` before each layer and after the last."""
    walk = LayerWalk(model, windows)
    states = [torch.cat(walk.hidden)]
    for layer in model.model.layers:
        walk.advance(layer)
        states.append(torch.cat(walk.hidden))
    return states


@reference("layers", "depth25-shortgpt", "ShortGPT 2403.03853, block influence")
def block_influence(model: Any, windows: torch.Tensor) -> dict[str, Any]:
    """The layers whose output is most like their input: ``1 - E cos(x_l, x_l+1)`` over all tokens, all chosen at once (Men et
    al. 2024).
    """
    states = _states(model, windows)
    influence = [1 - F.cosine_similarity(a, b, dim=-1).mean().item() for a, b in itertools.pairwise(states)]
    return _drop(model, sorted(range(len(influence)), key=influence.__getitem__)[: _count(model)])


def _angles(states: list[torch.Tensor], block: int) -> list[float]:
    """Angular distance over each run of ``block`` layers, at the last token of each window."""
    pairs = zip(states, states[block:], strict=False)
    cosines = (F.cosine_similarity(a[:, -1], b[:, -1], dim=-1).clamp(-1, 1) for a, b in pairs)
    return [float(cosine.acos().mean() / torch.pi) for cosine in cosines]


@reference("layers", "depth25-angular", "Gromov et al. 2403.17887, angular distance of a block")
def angular_block(model: Any, windows: torch.Tensor) -> dict[str, Any]:
    """The run of consecutive layers over which the last token turns least (Gromov et al. 2024)."""
    block = _count(model)
    angles = _angles(_states(model, windows), block)
    first = min(range(len(angles)), key=angles.__getitem__)
    return _drop(model, range(first, first + block))


@reference("layers", "depth25-greedy", "SLEB 2402.09025, greedy perplexity")
def greedy_perplexity(model: Any, windows: torch.Tensor) -> dict[str, Any]:
    """One layer at a time, each time the one without which the calibration loss is lowest (Song et al. 2024)."""
    layers, sample = list(model.model.layers), windows[:: max(1, len(windows) // SEARCH_WINDOWS)]
    gone: set[int] = set()

    @torch.no_grad()
    def loss_without(candidate: int) -> float:
        model.model.layers = nn.ModuleList(layer for i, layer in enumerate(layers) if i not in gone | {candidate})
        losses = [model(input_ids=ids, labels=ids, use_cache=False).loss.item() for ids in sample.split(8)]
        return sum(losses) / len(losses)

    for _ in range(round(len(layers) * FRACTION)):
        gone.add(min((i for i in range(len(layers)) if i not in gone), key=loss_without))
    model.model.layers = nn.ModuleList(layers)
    return _drop(model, gone)


@reference("layers", "depth25-replaceme", "ReplaceMe 2505.02819, least squares")
def replace_me(model: Any, windows: torch.Tensor) -> dict[str, Any]:
    """A run of layers replaced by a linear map, merged into the down projection before it (Shopkhoev et al. 2025).

    With ``M`` the MLP output and ``Y`` the residual stream beside it in the layer before the run, and ``L`` the stream after
    the run, ``T = argmin |M T + Y - L|``. The run is the one of least cosine distance that leaves a layer before it.
    """
    states, block = _states(model, windows), _count(model)
    candidates = range(1, len(model.model.layers) - block + 1)
    distance = {i: -F.cosine_similarity(states[i], states[i + block], dim=-1).mean().item() for i in candidates}
    first = min(candidates, key=distance.__getitem__)
    before, made = model.model.layers[first - 1], []
    hook = before.mlp.register_forward_hook(lambda module, inputs, output: made.append(output))
    walk = LayerWalk(model, windows)
    for layer in model.model.layers[:first]:
        walk.advance(layer)
    hook.remove()
    mlp = torch.cat(made).flatten(0, 1).double()
    wanted = (states[first + block].flatten(0, 1) - torch.cat(walk.hidden).flatten(0, 1)).double() + mlp
    mapping = torch.linalg.solve(damped(mlp.T @ mlp), mlp.T @ wanted)
    down = before.mlp.down_proj
    down.weight = nn.Parameter((mapping.T @ down.weight.detach().double()).float())
    return _drop(model, range(first, first + block))
