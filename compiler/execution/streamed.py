"""Run a transformers model whose weights are loaded one at a time, when an operator first reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from compile_sparse.compiler.ir.weights import TensorSource

__all__ = ["NeedsAbsent", "run_streamed"]


class NeedsAbsent(Exception):
    """The model reads a tensor that has no source."""


class _Loading(TorchDispatchMode):
    """Puts values in the place of placeholders in the arguments of every operator; they go with the operator's result."""

    def __init__(self, model: PreTrainedModel, sources: Mapping[str, TensorSource]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read: set[str] = set()
        self._sources = sources
        self._names: dict[int, list[str]] = {}  # several where tensors are tied
        for name, value in model.state_dict(keep_vars=True).items():
            self._names.setdefault(id(value), []).append(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(self._value, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _value(self, argument: Any) -> Any:
        names = self._names.get(id(argument)) if isinstance(argument, torch.Tensor) else None
        if not names:
            return argument
        self.read.update(names)
        name = next((name for name in names if name in self._sources), None)
        if name is None:
            raise NeedsAbsent(names[0])
        return self._sources[name].load()


def run_streamed(
    model: PreTrainedModel, sources: Mapping[str, TensorSource], inputs: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Outputs by name (tuples as ``name.0``, ``name.1``, ...), and the names of the tensors that were read.

    Memory follows the largest operator, not the model.

    Args:
        model: a skeleton; its parameters are placeholders.
        sources: by state-dict name.
        inputs: keyword arguments of ``forward``.

    Raises:
        NeedsAbsent: a tensor without a source is read.
    """
    loading = _Loading(model, sources)
    with torch.no_grad(), loading:
        result = model(**inputs)
    found: dict[str, torch.Tensor] = {}
    for name, value in result.items():
        leaves = pytree.tree_leaves(value)
        found |= {name if len(leaves) == 1 else f"{name}.{place}": leaf for place, leaf in enumerate(leaves)}
    return found, loading.read
