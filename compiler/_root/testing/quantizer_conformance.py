"""Does a quantizer keep its contract (``compiler/extension/quantizer_contract.py``)?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compile_sparse.compiler.extension.quantizer_contract import Quantizer
from compile_sparse.compiler.extension.quantizers import what_lacks
from compile_sparse.compiler.ir.quantization_grid import QuantizationGrid
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES
from compile_sparse.compiler.ir.weights import ResidentTensor
from compile_sparse.passes.quantization.weights import NVFP4_TOP, Weight
from compile_sparse.testing.conformance import require

__all__ = ["check_quantizer"]

_SHAPE = (24, 96)  # no multiple of 128 or 64: last groups and blocks are short


def check_quantizer(quantizer: Quantizer, schemes: Sequence[str] = tuple(SCHEMES)) -> None:
    """Give ``quantizer`` a weight in the format of every scheme and hold it to every rule of its contract.

    The class is complete; the weight that it is given stays as it was; codes and scales have the format's shapes and types, the
    zeros of a sparsity pattern stay exactly zero, the same input gives the same codes, and the values stay within the reach of
    the weight's own.

    Raises:
        NonConforming: naming the rule.
    """
    lacking = what_lacks(quantizer.name, type(quantizer))
    require(not lacking, "A quantizer is a complete subclass of Quantizer", quantizer.name, lacking)
    draws = torch.Generator().manual_seed(0)
    rows = torch.randn(_SHAPE, generator=draws)
    rows.view(-1, 4)[:, :2] = 0
    inputs = torch.randn(256, _SHAPE[1], generator=draws).double()
    statistics = inputs.T @ inputs / len(inputs) if quantizer.needs_statistics else None
    for scheme in schemes:
        fmt, where = SCHEMES[scheme].weights, f"{quantizer.name}, {scheme}"
        peak = float(rows.abs().max())
        shared = ResidentTensor(torch.tensor([NVFP4_TOP / peak if fmt.kind == "fp4" else peak]))
        weight = Weight("weight", ResidentTensor(rows.clone()), 1, fmt, torch.float32, shared, sparse=True)
        made = weight.computed(quantizer, statistics)  # its shapes, types and zeros are checked there
        require(bool(torch.equal(weight.source.load(), rows)), "The weight that it is given stays as it was", where)
        again = weight.computed(quantizer, statistics)
        same = all(torch.equal(made[key].view(torch.uint8), again[key].view(torch.uint8)) for key in made)
        require(same, "The same weight gives the same codes and scales", where)
        divisor = shared.load() if fmt.kind == "fp4" else None
        grid = QuantizationGrid(fmt, _SHAPE, made["scale"], made.get("zero_point"), divisor)
        values = grid.values(made["codes"])
        reach = bool(torch.isfinite(values).all()) and float(values.abs().max()) <= 2 * peak
        require(reach, "Values are finite and reach no further than twice the weight's own", where)
