"""Every linear of every layer as a product of two with 80 % of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from quality_references.registry import reference
from quality_references.solve import damped
from quality_references.walk import LayerWalk, Moments

__all__: list[str] = []

KEPT = 0.8
ASVD_POWER = 0.5
Factorise = Callable[[torch.Tensor, Moments | None, int], tuple[torch.Tensor, torch.Tensor]]
"""Weight ``[N, K]``, moments of its inputs and a rank to ``[N, r]`` and ``[r, K]``."""


def _rank(linear: nn.Linear) -> int:
    """Largest rank whose factors have at most ``KEPT`` of the parameters."""
    return int(KEPT * linear.in_features * linear.out_features / (linear.in_features + linear.out_features))


def _steps(layer: Any) -> list[list[str]]:
    """Linears of a layer in the order they run; those in one list read the same input."""
    return [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


def _replace(layer: Any, name: str, factors: tuple[torch.Tensor, torch.Tensor]) -> None:
    left, right = (factor.float().contiguous() for factor in factors)
    pair = nn.Sequential(nn.Linear(*right.T.shape, bias=False), nn.Linear(*left.T.shape, bias=False))
    pair[0].weight, pair[1].weight = nn.Parameter(right), nn.Parameter(left)
    parent, attribute = name.rsplit(".", 1)
    setattr(layer.get_submodule(parent), attribute, pair)


def _truncated(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def plain(weight: torch.Tensor, moments: Moments | None, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Truncated SVD of the weight."""
    return _truncated(weight, rank)


def scaled(weight: torch.Tensor, moments: Moments, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """SVD of ``W S`` with ``S = diag(mean |x|^0.5)``, divided by S again."""
    scale = (moments.absolute / moments.tokens).clamp_min(1e-6) ** ASVD_POWER
    left, right = _truncated(weight * scale, rank)
    return left, right / scale


def whitened(weight: torch.Tensor, moments: Moments, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """SVD of ``W C`` with ``C C^T`` the inputs' Gram matrix: the best approximation of the outputs ``W X`` of that rank."""
    factor = torch.linalg.cholesky(damped(moments.gram))
    left, right = _truncated(weight @ factor, rank)
    return left, torch.linalg.solve_triangular(factor, right, upper=False, left=False)


def _factorise_all(model: Any, windows: torch.Tensor, factorise: Factorise, *, dense_inputs: bool = True) -> None:
    """Replace every linear of every layer.

    With ``dense_inputs`` all statistics are the dense model's, else each step sees the inputs that the factors before it make.
    """
    walk = LayerWalk(model, windows)
    for layer in model.model.layers:
        steps = _steps(layer)
        if dense_inputs:
            dense = walk.observe(layer, [layer.get_submodule(names[0]) for names in steps])
            walk.advance(layer)
        for index, names in enumerate(steps):
            if dense_inputs:
                moments = dense[index]
            else:
                (moments,) = walk.observe(layer, [layer.get_submodule(names[0])])
            for name in names:
                linear = layer.get_submodule(name)
                _replace(layer, name, factorise(linear.weight.detach().double(), moments, _rank(linear)))
        if not dense_inputs:
            walk.advance(layer)


@reference("low-rank", "rank80-svd", "truncated SVD")
def svd(model: Any, windows: torch.Tensor) -> None:
    """No data at all."""
    for layer in model.model.layers:
        for name in (name for names in _steps(layer) for name in names):
            linear = layer.get_submodule(name)
            _replace(layer, name, plain(linear.weight.detach().double(), None, _rank(linear)))


@reference("low-rank", "rank80-asvd", "ASVD 2312.05821, equal ratios")
def asvd(model: Any, windows: torch.Tensor) -> None:
    """Activation-aware scaling (Yuan et al. 2023), without its search for unequal ranks."""
    _factorise_all(model, windows, scaled)


@reference("low-rank", "rank80-svdllm", "SVD-LLM 2403.07378, whitening")
def svd_llm(model: Any, windows: torch.Tensor) -> None:
    """Truncation-aware whitening on the dense model's inputs (Wang et al. 2024)."""
    _factorise_all(model, windows, whitened)


@reference("low-rank", "rank80-svdllm-seq", "SVD-LLM 2403.07378, sequential")
def svd_llm_sequential(model: Any, windows: torch.Tensor) -> None:
    """Whitening on the inputs that the layers factorised so far make (the paper's layer-wise update)."""
    _factorise_all(model, windows, whitened, dense_inputs=False)
