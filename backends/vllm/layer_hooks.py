"""Outputs of an engine's linear layers, call by call, under the names of the checkpoint's modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["LayerHooks"]

Values = dict[str, NDArray[np.float32]]


class LayerHooks:
    """Context manager: while it is active, ``calls`` grows with every call of the model.

    vLLM computes some layers of a checkpoint as one (``qkv_proj``, ``gate_up_proj``); the model's class says which
    (``packed_modules_mapping``), and the layer how its output is divided (``output_partition_sizes``).

    Args:
        engine: vLLM's ``LLM``, in this process.
        names: modules of the checkpoint; those that the engine has no linear layer for are left out.
    """

    def __init__(self, engine: Any, names: Collection[str]) -> None:
        self.calls: list[Values] = []
        self._engine, self._names = engine, set(names)
        self._latest: Values = {}
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        self._engine.apply_model(self._install)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def rows(self, number: int, count: int) -> Values:
        """The first ``count`` rows ``[count, N]`` of a call: an engine may pad its batch."""
        return {name: value[:count] for name, value in self.calls[number].items()} if number < len(self.calls) else {}

    def _install(self, model: Any) -> None:
        packed = dict(getattr(model, "packed_modules_mapping", None) or {})
        for path, module in model.named_modules():
            parent, _, own = path.rpartition(".")
            parts = [f"{parent}.{part}" if parent else part for part in packed.get(own, [own])]
            sizes = list(getattr(module, "output_partition_sizes", None) or ())
            if sizes and len(sizes) == len(parts) and self._names & set(parts):
                self._hooks.callback(module.register_forward_hook(self._keep(parts, sizes)).remove)
        self._hooks.callback(model.register_forward_hook(self._end_call).remove)

    def _keep(self, parts: Sequence[str], sizes: Sequence[int]) -> Callable[[Any, Any, Any], None]:
        def keep(module: Any, arguments: Any, output: Any) -> None:
            # A copy: the engine writes the next norm's result over it.
            value = (_sum_of(output) if isinstance(output, tuple) else output).detach().float().cpu().numpy().copy()
            edges = np.cumsum(sizes)[:-1]
            self._latest.update(zip(parts, np.split(value.reshape(-1, value.shape[-1]), edges, axis=-1), strict=True))

        return keep

    def _end_call(self, module: Any, arguments: Any, output: Any) -> None:
        self.calls.append(self._latest)
        self._latest = {}


def _sum_of(output: tuple[Any, Any]) -> Any:
    """Some layers leave adding their bias to what follows, and hand it on."""
    value, bias = output
    return value if bias is None else value + bias
