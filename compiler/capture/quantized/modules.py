"""The stored tensors of a checkpoint by the module they belong to."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from compile_sparse.compiler.capture.quantized.reading import misfit
from compile_sparse.compiler.capture.safetensors_reader import StoredTensor

__all__ = ["modules", "require", "require_shape"]


def modules(
    tensors: Mapping[str, StoredTensor], marks: Collection[str], also: Collection[str] = ()
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, StoredTensor]]:
    """Modules that have a tensor called one of ``marks``, and every tensor that is not of such a module.

    Args:
        tensors: by name.
        marks: last parts of names, which only quantized modules have.
        also: last parts of names that belong to such a module too.

    Returns:
        Module name -> last part -> tensor; and the rest by full name.
    """
    found: dict[str, dict[str, StoredTensor]] = {}
    for name in tensors:
        stem, _, part = name.rpartition(".")
        if part in marks:
            found.setdefault(stem, {})
    rest: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        if stem in found and (part in marks or part in also):
            found[stem][part] = tensor
        else:
            rest[name] = tensor
    return found, rest


def require(stem: str, own: Mapping[str, StoredTensor], parts: Collection[str]) -> None:
    """Refuse a module without one of ``parts`` (CS2021)."""
    missing = [part for part in parts if part not in own]
    if missing:
        raise misfit(f"{stem}.{missing[0]}", f"It is missing; the module has {', '.join(sorted(own))}.")


def require_shape(stem: str, part: str, tensor: StoredTensor, *shapes: tuple[int, ...]) -> None:
    """Refuse a tensor that has none of ``shapes`` (CS2021)."""
    if tensor.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise misfit(f"{stem}.{part}", f"It has the shape {list(tensor.shape)}; {wanted} was expected.")
