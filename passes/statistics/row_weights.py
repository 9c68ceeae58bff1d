"""How much each token counts where outputs of layers are compared."""

from __future__ import annotations

import torch

__all__ = ["row_weights"]


def row_weights(value: torch.Tensor) -> torch.Tensor:
    """``1 / mean_n v_tn^2``, ``[T, 1]`` float32, of a residual stream ``v: [..., N]``; 0 for rows that are zero.

    The next norm divides every token by its root mean square, so that an error matters relative to it. In trained decoders a few
    tokens (the first of a text, mostly) carry activations thousands of times larger than the others (arXiv:2402.17762); counted
    alike, they would be all that least squares sees.
    """
    energy = value.reshape(-1, value.shape[-1]).float().square().mean(1, keepdim=True)
    return torch.where(energy > 0, energy.clamp_min(torch.finfo(torch.float32).tiny).reciprocal(), energy)
