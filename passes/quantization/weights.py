"""The stored tensors of a quantized weight: codes, scales and, where the format has them, zero points or a global scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from compile_sparse.compiler.errors import EnvironmentFailure
from compile_sparse.compiler.extension.quantizer_contract import Quantizer
from compile_sparse.compiler.ir.linears import Linear, is_lm_head
from compile_sparse.compiler.ir.ops.quantization import FP4_MAX, FP8_MAX
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.quantization_schemes import WeightFormat
from compile_sparse.compiler.ir.weights import AbsentTensor, DerivedTensor, DowncastTensor, LastComputed, TensorSource
from compile_sparse.passes.quantization.scales import as_stored, fitted_grid

__all__ = ["NVFP4_TOP", "Quantized", "Weight", "weights_of"]

NVFP4_TOP = FP8_MAX * FP4_MAX
"""Largest value below the tensor's scale: the largest e4m3 scale times the largest e2m1 value."""

Quantized = LastComputed[dict[str, torch.Tensor]]
"""The tensors of the weight that was quantized last."""


@dataclass(frozen=True)
class Weight:
    """A weight that will be quantized.

    Attributes:
        tensor: its name.
        source: ``[N, K]`` or ``[K, N]``.
        axis: its contraction dimension, of size K.
        format: to which.
        stored: type the scales will be stored in.
        shared: what weights with one input have in common: the divisor of NVFP4, or the largest magnitude where a whole tensor
            has one scale. Runtimes fuse such weights and keep one number per fused matrix.
        sparse: whether its zeros are a sparsity pattern, which must stay.
    """

    tensor: str
    source: TensorSource
    axis: int
    format: WeightFormat
    stored: torch.dtype
    shared: TensorSource | None = None
    sparse: bool = False

    def absent(self) -> dict[str, TensorSource]:
        """The tensors, by shape alone."""
        shapes = self._shapes()
        made = {key: AbsentTensor(shape, dtype, self.tensor) for key, (shape, dtype) in shapes.items()}
        return self._complete(made)

    def computed(self, quantizer: Quantizer, statistics: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The tensors but the global scale, by ``quantizer``.

        Raises:
            EnvironmentFailure: CS5013 when it does not keep its contract.
        """
        value = self.source.load().to(torch.float32)
        rows = value if self.axis == 1 else value.t()
        zeros = rows == 0 if self.sparse else None
        grid = fitted_grid(rows, self.format, self.stored, self.shared.load() if self.shared is not None else None)
        codes, grid = quantizer.quantize(rows, grid, statistics=statistics, zeros=zeros)
        if self.format.kind == "int" and not torch.equal(grid.scale, as_stored(grid.scale, self.stored)):
            raise _broken(
                quantizer, self.tensor, f"Its scales are no values of {self.stored}, in which they are stored."
            )
        made = {"codes": codes, "scale": grid.scale}
        if grid.zero_point is not None:
            made["zero_point"] = grid.zero_point
        if zeros is not None and bool((grid.values(codes)[zeros] != 0).any()):
            raise _broken(quantizer, self.tensor, "Weights that must stay zero are not.")
        made["codes"] = codes if self.axis == 1 else codes.t().contiguous()
        shapes = {key: (tuple(each.shape), each.dtype) for key, each in made.items()}
        if shapes != self._shapes():
            raise _broken(quantizer, self.tensor, f"It made {shapes}, the format is {self._shapes()}.")
        return made

    def on_demand(
        self, quantizer: Quantizer, memory: Quantized, power: torch.Tensor | None = None
    ) -> dict[str, TensorSource]:
        """The tensors, quantized when they are written; ``memory`` is shared by the weights of a model.

        Args:
            power: mean squares of the inputs, for a quantizer that weighs them.
        """
        if isinstance(self.source, AbsentTensor):
            return self.absent()

        def part(key: str) -> torch.Tensor:
            return memory.get((self.tensor, self.axis), lambda: self.computed(quantizer, power))[key]

        return self._complete(
            {key: DerivedTensor(shape, dtype, partial(part, key)) for key, (shape, dtype) in self._shapes().items()}
        )

    def kept(
        self, keep: Callable[[torch.Tensor], TensorSource], made: Mapping[str, torch.Tensor]
    ) -> dict[str, TensorSource]:
        """The tensors, computed ahead as ``made`` and kept by ``keep``."""
        return self._complete({key: keep(value) for key, value in made.items()})

    def _complete(self, made: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
        """With the scale in its stored type, in which its values are representable already, and with the global scale."""
        found, scale = dict(made), made["scale"]
        if self.stored != torch.float32 and scale.dtype == torch.float32:
            found["scale"] = DowncastTensor(scale, self.stored)
        if self.format.kind == "fp4":
            assert self.shared is not None
            found["global_scale"] = self.shared
        return found

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        fmt, channels, depth = self.format, self.source.shape[1 - self.axis], self.source.shape[self.axis]
        groups = -(-depth // fmt.group) if fmt.group else 0
        codes = (self.source.shape, torch.float8_e4m3fn if fmt.kind == "fp8" else torch.int8)
        if fmt.kind == "fp4":
            return {"codes": codes, "scale": ((channels, groups), torch.float8_e4m3fn)}
        if fmt.block:
            return {"codes": codes, "scale": ((-(-channels // fmt.block), -(-depth // fmt.block)), torch.float32)}
        shape = (channels, groups) if fmt.group else (channels,)
        found = {"codes": codes, "scale": (shape, torch.float32)}
        return found if fmt.symmetric else {**found, "zero_point": (shape, torch.int8)}


def weights_of(
    program: Program, linears: Sequence[Linear], fmt: WeightFormat, stored: torch.dtype
) -> dict[tuple[str, int], Weight]:
    """The distinct weights of ``linears``, by tensor and contraction dimension. An lm_head gets 8 bits where others get 4: it is
    read once per token like every other layer, but decides every token.
    """
    together: dict[fx.Node, dict[str, TensorSource]] = {}
    for linear in linears:
        together.setdefault(linear.input, {})[linear.tensor] = program.weights[linear.tensor]
    # A tensor that several inputs are multiplied with belongs to the last of them.
    neighbours = {name: tuple(group.values()) for group in together.values() for name in group}
    found: dict[tuple[str, int], Weight] = {}
    for linear in linears:
        if (linear.tensor, linear.axis) in found:
            continue
        own = fmt
        if fmt.kind == "int" and fmt.bits == 4 and is_lm_head(program, linear.node):
            own = WeightFormat("int", 8, fmt.group)
        found[linear.tensor, linear.axis] = Weight(
            linear.tensor,
            program.weights[linear.tensor],
            linear.axis,
            own,
            stored,
            shared=_shared(linear.tensor, neighbours[linear.tensor], own),
            sparse=linear.tensor in program.masks,
        )
    return found


def _shared(tensor: str, sources: Sequence[TensorSource], fmt: WeightFormat) -> TensorSource | None:
    if fmt.kind != "fp4" and not fmt.per_tensor:
        return None
    if any(isinstance(source, AbsentTensor) for source in sources):
        return AbsentTensor((1,), torch.float32, tensor)

    def compute() -> torch.Tensor:
        peak = max(float(source.load().abs().max()) for source in sources)
        if fmt.per_tensor:
            return torch.tensor([peak])
        return torch.tensor([NVFP4_TOP / peak if peak else 1.0])

    return DerivedTensor((1,), torch.float32, compute)


def _broken(quantizer: Quantizer, tensor: str, why: str) -> EnvironmentFailure:
    return EnvironmentFailure(
        "CS5013",
        f"Quantizer {quantizer.name!r} does not keep its contract.",
        where=tensor,
        why=why,
        hint="Choose another quantizer; its author can correct it.",
    )
