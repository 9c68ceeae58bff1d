"""Turn a small ``nn.Module`` into a ``Program`` with ``torch.export`` alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from compile_sparse.compiler.ir.program import Binding, Input, Output, Program
from compile_sparse.compiler.ir.weights import ResidentTensor, WeightStore


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


class ConvNet(torch.nn.Module):
    """``[batch, 3, 8, 8] -> [batch, 5]``: batch norm, residual, depthwise, grouped and transposed convolution, group norm.

    Statistics, scales and shifts are random; the last linear reads channels and positions flattened together.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        nn = torch.nn
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.inner, self.inner_norm = nn.Conv2d(16, 10, 1, bias=False), nn.BatchNorm2d(10)
        self.depthwise, self.outer = nn.Conv2d(10, 10, 3, padding=1, groups=10), nn.Conv2d(10, 16, 1)
        self.grouped, self.group_norm = nn.Conv2d(16, 24, 3, stride=2, padding=1, groups=4), nn.GroupNorm(8, 24)
        self.transposed, self.head = nn.ConvTranspose2d(24, 14, 2, groups=2), nn.Linear(14 * 4, 5)
        for name, value in [*self.named_parameters(), *self.named_buffers()]:
            if value.ndim == 1:
                value.data = (
                    torch.rand_like(value) + 0.5 if name.endswith(("weight", "var")) else torch.randn_like(value)
                )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = torch.nn.functional.hardswish(self.inner_norm(self.inner(x)))
        x = x + self.outer(torch.relu(self.depthwise(y)))
        x = torch.nn.functional.silu(self.group_norm(self.grouped(x)))
        x = torch.nn.functional.max_pool2d(self.transposed(x), 2)
        out = self.head(x.flatten(1))
        assert isinstance(out, torch.Tensor)
        return out
