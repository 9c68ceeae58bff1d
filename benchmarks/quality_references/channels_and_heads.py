"""A quarter of the MLP channels, or of the key-value groups, of every layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from quality_references.registry import Unavailable, reference
from quality_references.solve import greedy_obs, refit
from quality_references.structures import Structure, kv_groups, mlp_channels
from quality_references.walk import LayerWalk, Moments, accumulate_gradients

__all__: list[str] = []

FRACTION = 0.25
Of = Callable[[Any], Structure]


def _best(scores: torch.Tensor, remove: int) -> torch.Tensor:
    return scores.argsort(descending=True, stable=True)[: len(scores) - remove].sort().values


def _removed(structure: Structure) -> int:
    return round(structure.count * FRACTION)


def magnitude(of: Of, model: Any, windows: torch.Tensor) -> None:
    """Smallest group norm: squares of a piece's weights in every coupled matrix (DepGraph, Fang et al. 2023, 2301.12900)."""
    for layer in model.model.layers:
        structure = of(layer)
        scores = structure.reduce([weight.square() for weight in structure.weights()])
        structure.keep(_best(scores, _removed(structure)))


def taylor(of: Of, model: Any, windows: torch.Tensor) -> None:
    """First-order loss change ``sum |w dL/dw|`` over a piece's coupled weights, from the gradient of the calibration loss
    (LLM-Pruner's ``param_first``, Ma et al. 2023, 2305.11627).
    """
    accumulate_gradients(model, windows)
    for layer in model.model.layers:
        structure = of(layer)
        products = zip(structure.weights(), structure.gradients(), strict=True)
        structure.keep(_best(structure.reduce([(w * g).abs() for w, g in products]), _removed(structure)))
    model.zero_grad()


def wanda_scores(structure: Structure, moments: Moments) -> torch.Tensor:
    """``sum_n |W_nj| |X_j|`` over the consumer's columns of a piece (Sun et al. 2023, 2306.11695; structured as in FASP)."""
    columns = structure.consumer.weight.detach().double().abs().sum(0) * moments.norms
    return columns.view(structure.count, -1).sum(1)


def wanda(of: Of, model: Any, windows: torch.Tensor, *, restore: bool = False) -> None:
    """Wanda's score per piece, layer by layer on the outputs of the pruned ones; with ``restore`` the consumer's remaining
    columns are refitted by least squares (FASP, Hu et al. 2025, 2501.09412).
    """
    walk = LayerWalk(model, windows)
    for layer in model.model.layers:
        structure = of(layer)
        (moments,) = walk.observe(layer, [structure.consumer])
        kept = _best(wanda_scores(structure, moments), _removed(structure))
        columns = structure.columns[kept].flatten()
        weight = refit(structure.consumer.weight.detach(), moments.gram, columns) if restore else None
        structure.keep(kept, weight)
        walk.advance(layer)


def obs(of: Of, model: Any, windows: torch.Tensor) -> None:
    """Greedy removal with the others refitted after each (ZipLM, Kurtic et al. 2023, 2302.04089; SlimGPT, 2412.18110)."""
    walk = LayerWalk(model, windows)
    for layer in model.model.layers:
        structure = of(layer)
        (moments,) = walk.observe(layer, [structure.consumer])
        kept, weight = greedy_obs(
            structure.consumer.weight.detach(), moments.gram, structure.columns, _removed(structure)
        )
        structure.keep(kept, weight[:, structure.columns[kept].flatten()])
        walk.advance(layer)


def flap(of: Of, model: Any, windows: torch.Tensor, *, adaptive: bool = False) -> dict[str, Any] | None:
    """Fluctuation ``Var(X_j) |W_:j|^2`` on the dense model, and the removed inputs' mean added as a bias (FLAP, An et al. 2023,
    2312.11983). With ``adaptive`` the scores are standardised per layer and compared over all layers, as in the paper.
    """
    walk, found = LayerWalk(model, windows), []
    for layer in model.model.layers:
        structure = of(layer)
        (moments,) = walk.observe(layer, [structure.consumer])
        columns = moments.variances * structure.consumer.weight.detach().double().square().sum(0)
        found.append((structure, moments, columns.view(structure.count, -1).sum(1)))
        walk.advance(layer)
    standardised = torch.stack([(scores - scores.mean()) / scores.std() for _, _, scores in found])
    total = round(standardised.numel() * FRACTION)
    threshold = standardised.flatten().sort().values[total - 1]
    widths = []
    for (structure, moments, scores), relative in zip(found, standardised, strict=True):
        kept = (relative > threshold).nonzero().squeeze(1) if adaptive else _best(scores, _removed(structure))
        if not len(kept):
            raise Unavailable("The global threshold removes a whole layer.")
        gone = torch.ones(structure.count, dtype=torch.bool)
        gone[kept] = False
        columns = structure.columns[gone].flatten()
        mean = (moments.total / moments.tokens)[columns]
        bias = (structure.consumer.weight.detach()[:, columns].double() @ mean).float()
        structure.keep(kept, bias=bias)
        widths.append(len(kept))
    return {"kept per layer": widths} if adaptive else None


for _kind, _prefix, _of in (("channels", "mlp25", mlp_channels), ("heads", "kv25", kv_groups)):
    for _suffix, _source, _method in (
        ("magnitude", "group norm, DepGraph 2301.12900", magnitude),
        ("taylor", "LLM-Pruner 2305.11627", taylor),
        ("wanda", "Wanda 2306.11695, structured", wanda),
        ("flap-uniform", "FLAP 2312.11983, equal widths", flap),
        ("flap", "FLAP 2312.11983, adaptive widths", partial(flap, adaptive=True)),
        ("fasp", "FASP 2501.09412: Wanda and least squares", partial(wanda, restore=True)),
        ("obs", "ZipLM 2302.04089: greedy OBS", obs),
    ):
        reference(_kind, f"{_prefix}-{_suffix}", _source)(partial(_method, _of))
