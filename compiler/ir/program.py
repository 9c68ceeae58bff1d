"""``Program``: the intermediate representation every pass and backend works on.

A flat, functional FX graph (the graph of a ``torch.export.ExportedProgram`` after normalisation) with three kinds of node:
``placeholder`` (weights first, then the model's inputs), ``call_function`` (ATen overloads, ``compile_sparse::`` ops,
``operator.getitem`` and integer arithmetic on sizes) and one ``output``. Weights are *not* in the graph: a placeholder is
bound by name to a ``WeightStore``. ``ExportedProgram`` itself is not kept because its signature wants every tensor in
memory; nothing of its graph is lost.

Programs are values: a pass clones, edits the clone and returns it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import fx

import compile_sparse.compiler.ir.ops  # noqa: F401  registers the operators a graph may hold
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.ir.weights import WeightStore

CODES = ".codes"
"""Suffix of the tensor that holds a quantized tensor's integer codes."""

__all__ = ["CODES", "Binding", "Input", "ModelKind", "ModelSource", "Output", "Program", "SparsityMask"]

ModelKind = Literal["decoder", "encoder", "vision", "audio"]
InputRole = Literal[
    "input_ids",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "pixel_values",
    "input_features",
    "past_key",
    "past_value",
    "other",
]
OutputRole = Literal["logits", "hidden", "present_key", "present_value", "other"]


@dataclass(frozen=True)
class Binding:
    """What a weight placeholder stands for.

    Attributes:
        tensor: name in the ``WeightStore``; for parameters, the Hugging Face state-dict key.
        kind: ``parameter`` (trained), ``buffer`` (state or computed constant).
    """

    tensor: str
    kind: Literal["parameter", "buffer"] = "parameter"


@dataclass(frozen=True)
class Input:
    """A model input: graph placeholder, public name, role, and the layer for cache tensors."""

    placeholder: str
    name: str
    role: InputRole
    layer: int = -1


@dataclass(frozen=True)
class Output:
    """A model output, in the order of the output node's arguments."""

    name: str
    role: OutputRole
    layer: int = -1


@dataclass(frozen=True)
class SparsityMask:
    """Annotation: the stored zeros of a tensor follow ``pattern`` along ``axis``. Later passes must keep them.

    Of a quantized weight the codes carry it: the values they stand for are zero there.

    Attributes:
        pattern: what ``SparsityPattern.parse`` reads, such as ``2:4`` (N:M along the axis), ``0.5`` or ``block=16x16:0.5``.
        axis: contraction dimension of the tensor, or -1 for patterns other than N:M.
        fraction: share of elements (for blocks: of blocks) that are zero at least.
    """

    pattern: str
    axis: int
    fraction: float


@dataclass(frozen=True)
class ModelSource:
    """Where a program was captured from.

    Attributes:
        folder: the model folder, for backends that copy tokenizer files from it; None for a model that was in memory. It is a
            place on this machine: nothing that is written may name it.
        said: what reading its weights had to say.
    """

    folder: Path | None = None
    said: tuple[Diagnostic, ...] = ()


@dataclass(frozen=True)
class Program:
    """A captured model. See the module docstring for the graph's form.

    Attributes:
        graph_module: holds the graph; its attributes carry no tensors.
        bindings: weight placeholder name -> what it is bound to, in graph order.
        inputs: model inputs in graph order (after the weights).
        outputs: one per element of the output node's tuple.
        weights: values by tensor name.
        kind: decoder (with key-value cache inputs and outputs), text encoder, or
            image or audio model.
        config: the Hugging Face config as plain data, as transformers reads it; backends read token ids, vocabulary size and
            context length from it.
        aliases: tied tensor name -> the name that is bound in the graph.
        masks: sparsity annotations by stored tensor name.
        source: where it came from; passes keep it.
    """

    graph_module: fx.GraphModule
    bindings: Mapping[str, Binding]
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    weights: WeightStore
    kind: ModelKind
    config: Mapping[str, Any]
    aliases: Mapping[str, str] = field(default_factory=dict)
    masks: Mapping[str, SparsityMask] = field(default_factory=dict)
    source: ModelSource = ModelSource()

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    def clone(self) -> Program:
        """A copy whose graph may be edited. Node names, meta values and the (immutable) weights are shared."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        copied = fx.GraphModule(torch.nn.Module(), graph)
        for old, new in zip(self.graph.nodes, copied.graph.nodes, strict=True):
            new.meta = dict(old.meta)
        return replace(self, graph_module=copied)

    def node(self, name: str) -> fx.Node:
        """The node called ``name``; KeyError when there is none."""
        for candidate in self.graph.nodes:
            if candidate.name == name:
                return candidate
        raise KeyError(name)

    def tensor_of(self, node: fx.Node) -> str | None:
        """Name of the stored tensor a placeholder is bound to, or None for anything else."""
        binding = self.bindings.get(node.name) if node.op == "placeholder" else None
        return binding.tensor if binding else None

    @property
    def output_nodes(self) -> tuple[fx.Node, ...]:
        """Arguments of the output node, aligned with ``outputs``."""
        return tuple(cast("Sequence[fx.Node]", next(iter(reversed(self.graph.nodes))).args[0]))

    def parameter_count(self) -> int:
        """Trained elements of the model: codes count, scales do not, and the codes of a tied tensor count once with it."""
        seen = {b.tensor.removesuffix(CODES): b.tensor for b in self.bindings.values() if b.kind == "parameter"}
        return sum(self.weights.elements(name) for name in seen.values())
