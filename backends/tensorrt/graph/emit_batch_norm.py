"""Batch norm at inference as one scale and one shift per channel, which TensorRT fuses into the convolution before it.

    y = x * s + t,  s = gamma / sqrt(var + eps),  t = beta - mean * s

Both are computed in float32 when they are written and stored in the type of ``x``. Source: arXiv:1502.03167, section 3.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from compile_sparse.backends.onnx.element_types import kind_of, raw_values
from compile_sparse.backends.onnx.emission import Emission, Unsupported
from compile_sparse.backends.tensorrt.graph.dialect import emits
from compile_sparse.compiler.ir.edit import schema_arguments
from compile_sparse.compiler.ir.nodes import dimensions

__all__: list[str] = []


@emits("aten::_native_batch_norm_legit_no_training", "aten::batch_norm")
def _batch_norm(emission: Emission, node: fx.Node) -> Any:
    given = schema_arguments(node)
    if given.get("training") or given["running_mean"] is None:
        raise Unsupported("batch norm with the statistics of the batch")
    sources = {name: given[name] for name in ("weight", "bias", "running_mean", "running_var")}
    if any(source is not None and source.op != "placeholder" for source in sources.values()):
        raise Unsupported("batch norm with computed parameters")
    rank, channels = emission.rank(given["input"]), dimensions(given["input"])[1]
    dtype, eps, program = emission.dtype(given["input"]), float(given["eps"]), emission.program
    shape = (1, int(channels), *[1] * (rank - 2))

    def load(name: str) -> torch.Tensor:
        return program.weights.load(str(program.tensor_of(sources[name]))).to(torch.float32)

    def scale() -> torch.Tensor:
        inverse = torch.rsqrt(load("running_var") + eps)
        return inverse if sources["weight"] is None else inverse * load("weight")

    def shift() -> torch.Tensor:
        moved = -load("running_mean") * scale()
        return moved if sources["bias"] is None else moved + load("bias")

    def stored(suffix: str, compute: Any) -> str:
        def make() -> np.ndarray[Any, Any]:
            return raw_values(compute().to(dtype).reshape(shape))

        return emission.graph.weight(f"{node.name}.{suffix}", shape, kind_of(dtype), make)

    scaled = emission.graph.call("Mul", [emission.value(given["input"]), stored("scale", scale)])
    name = emission.graph.call("Add", [scaled, stored("shift", shift)], hint=node.name)
    return [name, "", ""] if isinstance(node.meta["val"], (tuple, list)) else name
