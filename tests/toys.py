"""Turn a small ``nn.Module`` into a ``Program`` with ``torch.export`` alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from compile_sparse.compiler.program import Binding, Input, Output, Program
from compile_sparse.compiler.weights import ResidentTensor, WeightStore


def toy_program(
    module: torch.nn.Module,
    arguments: Sequence[torch.Tensor],
    dynamic: Sequence[dict[int, Any] | None] | None = None,
) -> Program:
    """Export ``module(*arguments)``; inputs are named x0, x1, ... and, like outputs, have role "other"."""
    shapes: Any = None if dynamic is None else tuple(dynamic)
    if shapes is not None and isinstance(module, Applied):
        shapes = (shapes,)  # one entry for *values
    exported = torch.export.export(module.eval(), tuple(arguments), dynamic_shapes=shapes).run_decompositions({})
    graph = fx.Graph()
    graph.output(graph.graph_copy(exported.graph, {}))
    copied = fx.GraphModule(torch.nn.Module(), graph)
    for old, new in zip(exported.graph.nodes, graph.nodes, strict=True):
        new.meta = dict(old.meta)
    bindings: dict[str, Binding] = {}
    sources: dict[str, ResidentTensor] = {}
    inputs: list[Input] = []
    for spec in exported.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind == InputKind.USER_INPUT:
            inputs.append(Input(name, f"x{len(inputs)}", "other"))
            continue
        parameter = spec.kind == InputKind.PARAMETER
        bindings[name] = Binding(spec.target, "parameter" if parameter else "buffer")
        store = exported.state_dict if spec.target in exported.state_dict else exported.constants
        sources[spec.target] = ResidentTensor(store[spec.target].detach())
    outputs = tuple(Output(f"y{place}", "other") for place in range(len(exported.graph_signature.output_specs)))
    return Program(copied, bindings, tuple(inputs), outputs, WeightStore(sources), "encoder", {})


class Applied(torch.nn.Module):
    """Any function as a module. Its positional arguments are the inputs."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: torch.Tensor) -> Any:
        return self.function(*values)
