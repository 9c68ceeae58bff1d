"""Refitting the weights that stay, in closed form."""

from __future__ import annotations

import torch

__all__ = ["greedy_obs", "refit"]

DAMPING = 1e-4
"""Added to the diagonal of a Gram matrix, as a share of its mean."""


def damped(gram: torch.Tensor) -> torch.Tensor:
    """The Gram matrix made safely invertible."""
    return gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def refit(weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """``argmin_V |W X - V X_kept|``: the weights ``[N, k]`` of the kept inputs that best replace ``W [N, K]``.

    With the Gram matrix ``G = X X^T``: ``V = W G[:, kept] G[kept, kept]^-1``.
    """
    factor = torch.linalg.cholesky(damped(gram)[kept][:, kept])
    return torch.cholesky_solve((weight.double() @ gram[:, kept]).T, factor).T.to(weight.dtype)


def greedy_obs(
    weight: torch.Tensor, gram: torch.Tensor, groups: torch.Tensor, remove: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove groups of inputs one at a time, each time the one whose loss after refitting the others is smallest.

    Optimal Brain Surgeon (Hassibi and Stork 1993) for groups of columns, as in ZipLM (Kurtic et al. 2023, 2302.04089): with
    ``P = G^-1`` removing group S costs ``sum_n w_nS (P_SS)^-1 w_nS^T`` and the others change by
    ``-W_S (P_SS)^-1 P_S,:``.

    Args:
        weight: ``[N, K]``.
        gram: ``[K, K]``.
        groups: column indices ``[count, size]``.
        remove: how many groups.

    Returns:
        Kept groups, ascending, and the updated weight ``[N, K]`` (removed columns are zero).
    """
    updated, inverse = weight.double().clone(), torch.linalg.inv(damped(gram))
    alive = torch.ones(len(groups), dtype=torch.bool)
    for _ in range(remove):
        left = alive.nonzero().squeeze(1)
        columns = groups[left]
        blocks = torch.linalg.inv(inverse[columns[:, :, None], columns[:, None, :]])
        parts = updated[:, columns].transpose(0, 1)  # [left, N, size]
        worst = int(left[((parts @ blocks) * parts).sum((1, 2)).argmin()])
        gone = groups[worst]
        step = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        updated -= updated[:, gone] @ step
        inverse -= inverse[:, gone] @ step
        updated[:, gone] = 0
        alive[worst] = False
    return alive.nonzero().squeeze(1), updated.to(weight.dtype)
