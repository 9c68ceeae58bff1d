"""What ``torch.export`` made of a model, kept on disk for both test processes and the next run.

Exporting a tiny model takes seconds, is asked for in every folder of the suite, and depends on little: the model's class and
config, the sample it is exported with, the code of ``compiler/capture`` and the versions of torch and transformers. All of
these are in the name of the file. Only the export is remembered: binding weights, normalising, folding and everything after
run each time, on a graph that was compared with the exported one when it was written.

Files are pickles of our own making, in pytest's cache folder; ``pytest --cache-clear`` removes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature
from torch.fx._graph_pickler import GraphPickler, Options
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from compile_sparse.compiler.capture import huggingface
from compile_sparse.compiler.capture.samples import Sample

__all__ = ["Export", "Exports", "differences"]

META = ("val", "stack_trace", "nn_module_stack")
"""What our code reads of a node. The rest describes how export came to it, and holds nodes of other graphs."""

_OPTIONS = Options(ops_filter=None, node_metadata_key_filter=META.__contains__)
_EXPORT = huggingface._export


class _Pickler(GraphPickler):
    """Keeps of a fake tensor what an operator sees. torch's own also keeps storages and views, at twice the time."""

    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, FakeTensor) and not isinstance(obj, torch.nn.Parameter):
            return _fake_tensor, (self._unpickle_state, tuple(obj.shape), obj.stride(), obj.dtype, obj.requires_grad)
        return super().reducer_override(obj)


def _fake_tensor(state: Any, shape: Any, stride: Any, dtype: torch.dtype, requires_grad: bool) -> FakeTensor:
    with torch._C._DisableTorchDispatch():
        meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta", requires_grad=requires_grad)
    return FakeTensor(state.fake_mode, meta, torch.device("cpu"))


@dataclass(frozen=True)
class Export:
    """The parts of an ``ExportedProgram`` that capture reads."""

    graph_module: fx.GraphModule
    graph_signature: ExportGraphSignature
    constants: Mapping[str, torch.Tensor]
    state_dict: Mapping[str, torch.Tensor]

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph


class Exports:
    """``torch.export`` with a memory in ``folder``. ``fresh`` counts what it had to export."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.fresh = 0

    def export(self, model: PreTrainedModel, sample: Sample) -> ExportedProgram | Export:
        """In place of ``huggingface._export``: the same values, in the model's own fake mode."""
        if not all(map(_from_a_library, model.modules())):  # its code is not in the key
            return _EXPORT(model, sample)
        mode = _mode_of(model)
        file = self._folder / f"{type(model).__name__}-{self.key(model, sample)}"
        if file.exists():
            return _loaded(file.read_bytes(), model, mode)
        self.fresh += 1
        exported = _EXPORT(model, sample)
        parts = exported.graph_module, exported.graph_signature, dict(exported.constants)
        content = _Pickler.dumps(parts, _OPTIONS)
        found = differences(exported, _loaded(content, model, huggingface.new_fake_mode()))
        if found:
            raise AssertionError(f"the export of {type(model).__name__} is not restored as it was: {found[:3]}")
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(file)  # the other process may write the same
        return exported

    @staticmethod
    def key(model: PreTrainedModel, sample: Sample) -> str:
        """Name of the file: everything an export depends on."""
        leaves = pytree.tree_leaves(sample.kwargs)
        told = {
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "config": model.config.to_dict(),
            "tensors": {name: _plain(value) for name, value in model.state_dict(keep_vars=True).items()},
            "sample": [sample.inputs, sample.outputs, str(sample.dynamic_shapes), *map(_plain, leaves)],
            "always": getattr(model.forward, "keywords", {}),  # what the skeleton was told once and for all
            "versions": [sys.version, *map(version, ("torch", "transformers", "sympy"))],
            "code": [
                file.read_text(encoding="utf-8") for file in sorted(Path(huggingface.__file__).parent.glob("*.py"))
            ],
            "format": Path(__file__).read_text(encoding="utf-8"),
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _from_a_library(module: torch.nn.Module) -> bool:
    """Whether the versions of torch and transformers say what it computes; not so for a class or a ``forward`` of a test."""
    return all(each.__module__.startswith(("torch.", "transformers.")) for each in (type(module), type(module).forward))


def differences(one: ExportedProgram | Export, other: ExportedProgram | Export) -> list[str]:
    """Where two exports differ, in words; symbolic sizes are compared by their names, ranges and hints."""
    found = [] if str(one.graph) == str(other.graph) else ["graphs"]
    if str(one.graph_signature) != str(other.graph_signature):
        found.append("signatures")
    for a, b in zip(one.graph.nodes, other.graph.nodes, strict=False):
        found += [f"{key} of {a.name}" for key in META if _plain(a.meta.get(key)) != _plain(b.meta.get(key))]
    for kind in ("constants", "state_dict"):  # a model may have more tensors than its export
        had, has = getattr(one, kind), getattr(other, kind)
        found += [f"{kind} {name}" for name in had if name not in has or _value(had[name]) != _value(has[name])]
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        strides = [_plain(stride) for stride in value.stride()]
        return [_plain(size) for size in value.shape], strides, value.dtype, value.device, value.requires_grad
    if isinstance(value, torch.SymInt):
        node = value.node
        bounds = {str(s): str(node.shape_env.var_to_range.get(s)) for s in node.expr.free_symbols}
        return str(node.expr), bounds, node.hint
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)


def _value(value: Any) -> Any:
    return _plain(value) if isinstance(value, FakeTensor) else (_plain(value), value.detach().numpy().tobytes())


def _loaded(content: bytes, model: PreTrainedModel, mode: FakeTensorMode) -> Export:
    graph_module, signature, constants = GraphPickler.loads(content, mode)
    return Export(graph_module, signature, constants, model.state_dict(keep_vars=True))


def _mode_of(model: PreTrainedModel) -> FakeTensorMode:
    return next(value.fake_mode for value in model.parameters() if isinstance(value, FakeTensor))
