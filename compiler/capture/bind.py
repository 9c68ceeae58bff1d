"""Match the checkpoint's tensors with the model's parameters by name and shape."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.weights import AbsentTensor, TensorSource

__all__ = ["bind_weights"]


def bind_weights(model: PreTrainedModel, checkpoint: Mapping[str, TensorSource] | None) -> dict[str, TensorSource]:
    """A source for every state-dict name of ``model``; shapes only when ``checkpoint`` is None.

    A checkpoint may hold a tied tensor once, and may be written from the bare base model (names without its prefix) or for
    one with a head (names with it): those three spellings are understood.

    Raises:
        ModelError: CS2005 when a tensor is missing or has another shape than the config implies.
    """
    wanted = model.state_dict(keep_vars=True)
    if checkpoint is None:
        return {name: AbsentTensor(tuple(value.shape), value.dtype, name) for name, value in wanted.items()}
    tied: dict[int, list[str]] = {}
    for name, value in wanted.items():
        tied.setdefault(id(value), []).append(name)
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    sources: dict[str, TensorSource] = {}
    missing: list[str] = []
    wrong: list[str] = []
    for name, value in wanted.items():
        spellings = [s for n in [name, *tied[id(value)]] for s in (n, prefix + n, n.removeprefix(prefix))]
        found = next((checkpoint[s] for s in spellings if s in checkpoint), None)
        if found is None:
            missing.append(name)
        elif found.shape != tuple(value.shape):
            wrong.append(f"{name} is {list(found.shape)}, the config implies {list(value.shape)}")
        else:
            sources[name] = found
    if missing or wrong:
        parts = []
        if wrong:
            parts.append("; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""))
        if missing:
            parts.append(
                "missing: " + ", ".join(missing[:3]) + (f", and {len(missing) - 3} more" if len(missing) > 3 else "")
            )
        raise ModelError(
            "CS2005",
            "The config and the weights disagree.",
            where=type(model).__name__,
            why=". ".join(parts) + ".",
            hint="Use the config.json that was saved with these weights.",
        )
    return sources
