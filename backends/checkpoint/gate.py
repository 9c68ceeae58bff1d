"""The last word on a config: the model it describes must compute what the program computes.

Equal shapes prove little. A config also decides numbers that no tensor shows: how many heads share a projection, the scale of
attention, rotary frequencies, a multiplier on embeddings. So the class itself is run on a few random inputs with the program's
weights, loaded one at a time, and its outputs are compared with the program's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx
from transformers import PreTrainedModel

from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.execution.streamed import NeedsAbsent, run_streamed
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import AbsentTensor, DerivedTensor, ResidentTensor, TensorSource, WeightStore
from compile_sparse.compiler.verify.class_outputs import (
    class_arguments,
    largest_difference,
    program_inputs,
    rounding_bound,
    without_cache,
)

__all__ = ["Gate", "Verdict"]

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate computes what the program computes.

    Attributes:
        accepted: all outputs agree.
        difference: largest absolute difference of any output, relative to that output's largest value; infinite where the
            candidate needs a tensor the program does not have.
        bound: what rounding explains.
        unused: tensors of the candidate that its outputs do not depend on and the program does not have.
        raised: what the class said where it did not run, in one line.
    """

    accepted: bool
    difference: float
    bound: float
    unused: tuple[str, ...] = ()
    raised: str = ""


class Gate:
    """Compares candidates with one program.

    Both run in float32 whatever their dtype, so that rounding to 16 bits cannot hide a wrong config.
    """

    def __init__(self, program: Program) -> None:
        self._program = _in_float32(program)

    def judge(
        self,
        skeleton: PreTrainedModel,
        sources: Mapping[str, TensorSource],
        *,
        zero: frozenset[str] = frozenset(),
    ) -> Verdict:
        """Run ``skeleton`` with the program's tensors in it and compare outputs.

        Args:
            skeleton: the candidate in float32.
            sources: the program's tensors by state-dict name.
            zero: names that are zero because the program leaves their branch out.
        """
        values: dict[str, TensorSource] = {name: _as_float32(source) for name, source in sources.items()}
        state = skeleton.state_dict()
        for name in zero & set(state):
            values[name] = ResidentTensor(torch.zeros((), dtype=state[name].dtype).expand(state[name].shape))
        # First, so that its own failures are not the candidate's.
        expected, bound = self._expected, rounding_bound(self._program)
        try:
            found, read = run_streamed(skeleton, values, class_arguments(self._program, self._inputs))
        except (NeedsAbsent, RuntimeError, ValueError, TypeError, IndexError) as error:
            # It does not fit together, whatever the shapes.
            return Verdict(False, float("inf"), bound, raised=next(iter(str(error).splitlines()), type(error).__name__))
        difference = largest_difference(expected, found)
        unused = tuple(sorted(set(state) - set(values) - read))
        return Verdict(difference <= bound, difference, bound, unused)

    @cached_property
    def _inputs(self) -> dict[str, torch.Tensor]:
        return program_inputs(self._program)

    @cached_property
    def _expected(self) -> dict[str, torch.Tensor]:
        return without_cache(self._program, Executor(self._program, cache_bytes=0).run(self._inputs))


def _in_float32(program: Program) -> Program:
    """The same program with 16-bit types replaced throughout."""
    if not any(source.dtype in _HALF for source in program.weights.values()):
        return program

    def widened(value: Any) -> Any:
        return torch.float32 if value in _HALF and isinstance(value, torch.dtype) else value

    wide = program.clone()
    for node in wide.graph.nodes:
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, widened)
            node.kwargs = fx.node.map_aggregate(node.kwargs, widened)
    return replace(wide, weights=WeightStore({name: _as_float32(source) for name, source in wide.weights.items()}))


def _as_float32(source: TensorSource) -> TensorSource:
    if source.dtype not in _HALF:
        return source
    if isinstance(source, AbsentTensor):
        return AbsentTensor(source.shape, torch.float32, source.name)
    return DerivedTensor(tuple(source.shape), torch.float32, lambda: source.load().float())
