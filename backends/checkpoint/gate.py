"""The last word on a config: the model it describes must compute what the program computes.

Equal shapes prove little. A config also decides numbers that no tensor shows: how many heads share a projection, the scale of
attention, rotary frequencies, a multiplier on embeddings. So the class itself is run on a few random inputs with the program's
weights, loaded one at a time, and its outputs are compared with the program's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt
from typing import Any

import torch
from torch import fx
from transformers import PreTrainedModel

from compile_sparse.backends.checkpoint.streamed import NeedsAbsent, run_streamed
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.ir.edit import op_name
from compile_sparse.compiler.ir.gemms import multiplies
from compile_sparse.compiler.ir.model_facts import context_length
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.weights import AbsentTensor, DerivedTensor, ResidentTensor, TensorSource, WeightStore
from compile_sparse.compiler.verify.reference import sample_inputs

__all__ = ["Gate", "Verdict"]

BATCH, TOKENS = 2, 24
_HALF = (torch.float16, torch.bfloat16)
_ATTENTION = "scaled_dot_product_attention"


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
        expected, bound = self._expected, self._bound()  # first, so that its own failures are not the candidate's
        try:
            found, read = run_streamed(skeleton, values, self._arguments())
        except (NeedsAbsent, RuntimeError, ValueError, TypeError, IndexError) as error:
            # It does not fit together, whatever the shapes.
            return Verdict(False, float("inf"), bound, raised=next(iter(str(error).splitlines()), type(error).__name__))
        difference = _difference(expected, found)
        unused = tuple(sorted(set(state) - set(values) - read))
        return Verdict(difference <= bound, difference, bound, unused)

    @cached_property
    def _expected(self) -> dict[str, torch.Tensor]:
        computed = Executor(self._program, cache_bytes=0).run(self._inputs())
        caches = {output.name for output in self._program.outputs if output.role.startswith("present")}
        return {name: value.float() for name, value in computed.items() if name not in caches}

    def _bound(self) -> float:
        """Rounding in ``n`` GEMMs of up to ``K`` terms each, in another order of summation: about ``eps sqrt(K n)``.

        Rounding errors behave like a random walk (Higham and Mary, "A new approach to probabilistic rounding error analysis",
        2019); a factor 4 covers the tail.
        """
        gemms = sum(multiplies(node) or op_name(node) == _ATTENTION for node in self._program.graph.nodes)
        longest = max(
            (max(source.shape) for source in self._program.weights.values() if len(source.shape) > 1), default=1
        )
        return 4 * torch.finfo(torch.float32).eps * sqrt(longest * max(1, gemms))

    def _inputs(self) -> dict[str, torch.Tensor]:
        """Inputs of the program; a decoder's cache is empty."""
        program = self._program
        if program.kind == "decoder":
            length = min(TOKENS, context_length(program.config) or TOKENS)
            draw = torch.Generator().manual_seed(0)
            vocabulary = int(program.config["vocab_size"])
            return decoder_inputs(program, torch.randint(0, vocabulary, (BATCH, length), generator=draw))
        arrays = sample_inputs(program, 0, batch=BATCH, length=TOKENS)
        return {name: torch.from_numpy(value) for name, value in arrays.items()}

    def _arguments(self) -> dict[str, Any]:
        """The same for the class."""
        inputs = self._inputs()
        if self._program.kind != "decoder":
            return dict(inputs)
        own = {entry.name for entry in self._program.inputs if entry.role in ("input_ids", "attention_mask")}
        return {**{name: inputs[name] for name in own}, "use_cache": False}


def _difference(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> float:
    worst = 0.0
    for name, value in expected.items():
        if name not in found or found[name].shape != value.shape:
            return float("inf")
        error = float((found[name].float() - value).abs().max() / value.abs().max().clamp_min(1e-30))
        worst = max(worst, error) if error == error else float("inf")
    return worst


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
