"""Do values leave the range of fp16? Weights that fit say nothing about what is computed from them.

A runtime that keeps values in fp16 gives infinity beyond 65504, and NaN soon after. ONNX Runtime's kernels for processors
compute in float32 between conversions and would not show it, so the program itself is watched, on the text it is checked on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.ir.nodes import traced_module
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.verify.reference import SAMPLES, sample_inputs

__all__ = ["require_range"]


def require_range(
    program: Program,
    names: Collection[str],
    *,
    windows: Sequence[Sequence[int]],
    seed: int,
    progress: Progress,
) -> None:
    """Run ``program`` in float32 and compare the nodes called ``names`` with the range of fp16.

    Args:
        program: as it will be computed.
        names: nodes whose values the runtime keeps in fp16.
        windows: token ids of one length (decoders).
        seed: of inputs that are drawn, for other models.
        progress: where it is reported.

    Raises:
        Refusal: CS4432, with the node, its module and the largest value.
    """
    largest = dict.fromkeys(names, 0.0)

    def observer(name: str) -> Callable[[torch.Tensor], None]:
        def observe(value: object) -> None:
            if isinstance(value, torch.Tensor) and value.numel():
                largest[name] = max(largest[name], float(value.abs().max()))

        return observe

    if program.kind == "decoder":
        inputs = decoder_inputs(program, torch.tensor([list(window) for window in windows], dtype=torch.long))
    else:
        drawn = sample_inputs(program, seed, batch=SAMPLES)
        inputs = {name: torch.from_numpy(value) for name, value in drawn.items()}
    with progress.task("range of values", total=1) as task:
        Executor(program).run(inputs, observe={name: observer(name) for name in largest})
        task.advance()
    limit = torch.finfo(torch.float16).max
    beyond = [name for name, value in largest.items() if not value <= limit]
    if not beyond:
        return
    module = traced_module(program.node(beyond[0]))
    raise Refusal(
        "CS4432",
        "Values of this model are out of the range of float16.",
        where=f"{beyond[0]} ({module})" if module else beyond[0],
        why=f"It reaches {largest[beyond[0]]:.4g}; the type ends at {limit:.4g}. "
        f"{len(beyond):,} of {len(largest):,} values leave it on the inputs the artifact is checked on.",
        hint="Choose --precision bf16, whose range is that of float32.",
    )
