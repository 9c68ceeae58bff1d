"""2:4 compressed weights on disk: the kept values, and two bits for the place of each.

Of every four neighbours along the input at most two are not zero. For ``W: [out, in]``:

* ``values: [out, in / 2]`` in the dtype of ``W``: two of each group of four, in their order;
* ``indices: [out, in / 8]``, uint8: the places in their groups, 0 to 3, four to a byte, the first in the lowest two bits.

With 16-bit values that is 9/16 of the dense size.
"""

from __future__ import annotations

import torch

__all__ = ["compress_24", "expand_24"]

_SHIFTS = (0, 2, 4, 6)


def compress_24(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(values, indices)`` of ``weight``; exact, except that a negative zero may come back as zero.

    Args:
        weight: ``[out, in]``, ``in`` a multiple of 8.

    Raises:
        ValueError: wrong shape, or more than two values in a group of four.
    """
    if weight.dim() != 2 or weight.shape[1] % 8:
        raise ValueError(f"A 2:4 weight is [out, in] with 'in' a multiple of 8, got {list(weight.shape)}.")
    out, width = weight.shape
    groups = weight.reshape(out, width // 4, 4)
    crowded = (groups != 0).sum(-1) > 2
    if crowded.any():
        row, group = crowded.nonzero()[0].tolist()
        raise ValueError(
            f"Row {row} has more than two values in columns {4 * group} to {4 * group + 3}; "
            f"{int(crowded.sum()):,} of {crowded.numel():,} groups are not 2:4."
        )
    # Places of values first, in order (the sort is stable); zeros fill up groups with fewer than two.
    places = (groups == 0).to(torch.uint8).argsort(dim=-1, stable=True)[..., :2].sort(dim=-1).values
    values = groups.gather(2, places).reshape(out, width // 2)
    fours = places.to(torch.uint8).reshape(out, width // 8, 4)
    shifts = torch.tensor(_SHIFTS, dtype=torch.uint8, device=weight.device)
    return values, (fours << shifts).sum(-1, dtype=torch.uint8)


def expand_24(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The dense weight ``[out, in]`` of ``values: [out, in / 2]`` and ``indices: [out, in / 8]``.

    Raises:
        ValueError: shapes or dtype that do not fit; places of a group that are equal or out of order.
    """
    out, half = values.shape
    if indices.shape != (out, half // 4) or half % 4 or indices.dtype != torch.uint8:
        raise ValueError(
            f"Values {list(values.shape)} need uint8 indices {[out, half // 4]}, got {list(indices.shape)} {indices.dtype}."
        )
    places = torch.stack([(indices >> shift) & 3 for shift in _SHIFTS], dim=-1).reshape(out, half // 2, 2)
    if not (places[..., 0] < places[..., 1]).all():
        raise ValueError("The two places of a group of four are not in order.")
    dense = values.new_zeros(out, half // 2, 4)
    return dense.scatter_(2, places.long(), values.reshape(out, half // 2, 2)).reshape(out, 2 * half)
