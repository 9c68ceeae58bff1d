"""What a runtime has to offer: a loaded folder that is called, and that generates through a cache."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from compile_sparse.backends.worker.errors import RequestError

__all__ = ["Array", "Generation", "Model", "Tokens", "Watched", "taken"]

Array = NDArray[Any]
Tokens = NDArray[np.int64]


class Generation(Protocol):
    """A batch of sequences of equal length, growing through the cache."""

    def step(self, ids: Tokens) -> Array:
        """Logits ``[B, S, V]`` of new tokens ``ids [B, S]``."""
        ...


class Model(Protocol):
    """One loaded folder.

    Attributes:
        inputs: names.
        outputs: names; none where only a call tells them.
        share_buffer: past and present keys and values are one buffer.
    """

    @property
    def inputs(self) -> Collection[str]: ...

    @property
    def outputs(self) -> Collection[str]: ...

    @property
    def share_buffer(self) -> bool: ...

    def generation(self, batch: int, capacity: int) -> Generation:
        """``batch`` empty sequences that will not grow beyond ``capacity`` tokens.

        Raises:
            RequestError: it is no decoder with a cache.
        """
        ...

    def run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """Outputs of one call by name.

        Raises:
            RequestError: the feeds are not its inputs.
        """
        ...


@runtime_checkable
class Watched(Protocol):
    """A model that shows the outputs of single layers."""

    def watch(self, values: Collection[str]) -> AbstractContextManager[Mapping[str, Array]]:
        """Within the context, the outputs of layers called ``values``, always those of the latest call; float32."""
        ...


def taken(inputs: Collection[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """``feeds`` of the graph's ``inputs``; others, which a changed graph may have lost, are left out.

    Raises:
        RequestError: one is missing.
    """
    missing = [name for name in inputs if name not in feeds]
    if missing:
        raise RequestError(f"feeds lack {', '.join(missing)}")
    return {name: feeds[name] for name in inputs}
