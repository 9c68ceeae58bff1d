"""A weight in every scheme, and what is stored of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.ops.quantization import FP4_VALUES
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES, Scheme
from compile_sparse.compiler.ir.verifier import verify_program
from compile_sparse.compiler.targets.target import Target
from compile_sparse.passes.quantize import Quantize
from tests.support.contexts import context as any_context
from tests.support.contexts import target
from tests.toys import toy_program
from tests.unit.passes.running import AddMM, Fed, Linear

ROWS = 136
DEPTH = 264  # a multiple of 8 only: last groups of 16, 32 and 128 are short, and so are last blocks
EPS = float(np.finfo(np.float32).eps)
Array = np.ndarray[Any, Any]
STATIC = [name for name, scheme in SCHEMES.items() if scheme.static]
WEIGHT_ONLY = [name for name, scheme in SCHEMES.items() if not scheme.activations]
WINDOWS = CalibrationStream(
    tuple(tuple(torch.randint(3, 96, (9 + i,), generator=torch.Generator().manual_seed(i)).tolist()) for i in range(3))
)


def serving(**changes: Any) -> Target:
    """As serving runtimes are: weights of bfloat16."""
    update = {"baseline_precision": "bf16", **changes}
    return target(tuple(SCHEMES)).model_copy(update=update)


def context(calibration: CalibrationStream | None = None, *, plan_only: bool = False, **changes: Any) -> PassContext:
    return any_context(calibration, goal=serving(**changes), plan_only=plan_only)


def weight() -> torch.Tensor:
    """Random, with a row of zeros, zeros elsewhere, a large value of either sign, and a row of one sign."""
    made = torch.randn(ROWS, DEPTH, generator=torch.Generator().manual_seed(3))
    made[:, 10:14] = 0
    made[4] = 0
    made[5, 7], made[6, 7] = 9.0, -9.0
    made[7] = made[7].abs()
    return made


def inputs() -> torch.Tensor:
    made = torch.randn(3, DEPTH, generator=torch.Generator().manual_seed(1))
    made[1] *= 0.01
    return made


def quantized(
    scheme: str, form: type[Linear] | type[AddMM] = Linear, reduce_range: bool = False, **changes: Any
) -> Program:
    calibration = Fed((), inputs=(inputs(),)) if SCHEMES[scheme].static else None
    made = Quantize(scheme=scheme, reduce_range=reduce_range)  # type: ignore[arg-type]
    program = toy_program(form(weight()), [torch.zeros(3, DEPTH)])
    result = made.run(program, context(calibration, **changes)).program
    verify_program(result)
    return result


def e4m3() -> Array:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy().astype(np.float64)
    return np.unique(np.concatenate([-codes, codes]))


def e2m1() -> Array:
    values = np.array(FP4_VALUES)
    return np.unique(np.concatenate([-values, values]))


@dataclass(frozen=True)
class Coded:
    """A stored weight in float64: values are ``(codes - zero) * step``; all ``[N, K]``."""

    codes: Array
    zero: Array
    step: Array
    table: Array
    """What ``codes`` may be."""

    @property
    def values(self) -> Array:
        return (self.codes - self.zero) * self.step


def side(scheme: Scheme) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    fmt = scheme.weights
    return (fmt.block, fmt.block) if fmt.block else (1, fmt.group or DEPTH)


def spread(value: Array, scheme: Scheme) -> Array:
    rows, columns = side(scheme)
    return np.repeat(np.repeat(value.reshape(-(-ROWS // rows), -1), rows, 0), columns, 1)[:ROWS, :DEPTH]


def stored(program: Program, name: str, form: type[Linear] | type[AddMM] = Linear, bits: int = 0) -> Coded:
    scheme, load = SCHEMES[name], program.weights.load
    raw, scale = load("weight.codes"), load("weight.scale").float().numpy().astype(np.float64)
    codes = (raw if form.axis == 1 else raw.t()).float().numpy().astype(np.float64)
    zero = np.zeros((ROWS, DEPTH))
    fmt = scheme.weights
    if fmt.kind == "fp4":
        assert raw.dtype == torch.int8
        assert codes.min() >= 0
        assert codes.max() <= 15
        codes = np.array([*FP4_VALUES, *(-value for value in FP4_VALUES)])[codes.astype(int)]
        scale /= float(load("weight.global_scale"))
        return Coded(codes, zero, spread(scale, scheme), e2m1())
    if fmt.kind == "fp8":
        assert raw.dtype == torch.float8_e4m3fn
        return Coded(codes, zero, spread(scale, scheme), e4m3())
    assert raw.dtype == torch.int8
    top = 2 ** ((bits or fmt.bits) - 1)
    if not fmt.symmetric:
        points = load("weight.zero_point")
        assert points.dtype == torch.int8
        zero = spread(points.numpy().astype(np.float64), scheme)
        assert zero.min() >= 0
        assert zero.max() <= 2 * top - 1
        return Coded(codes, zero, spread(scale, scheme), np.arange(2.0 * top))
    lowest = -top if fmt.group else -(top - 1)  # channels: as many codes below zero as above
    return Coded(codes, zero, spread(scale, scheme), np.arange(lowest, top, dtype=np.float64))
