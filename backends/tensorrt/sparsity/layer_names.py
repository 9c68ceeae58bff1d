"""TensorRT's names of layers, and the ONNX nodes in them.

A layer that came from one node has its name. Fused ones join names: ``a + b`` (one after the other), ``a || b`` (side by side).
Suffixes say for which optimization profile a layer is (`` [profile 1]``) and what the graph compiler made of it
(``_myl0_12``). ``{ForeignNode[a...b]}`` is a whole stretch of the graph from ``a`` to ``b``: what holds for it holds for none of
its nodes alone, so it stands for no node here.
"""

from __future__ import annotations

import re

__all__ = ["nodes_of", "profile_of", "split_list"]

_PROFILE = re.compile(r"\s*\[profile (\d+)\]\s*\Z")
_COMPILED = re.compile(r"_myl\d+_\d+\Z")
_STRETCH = re.compile(r"\{ForeignNode\[(.*)\]\}\Z", re.DOTALL)
_FUSED = re.compile(r"\s+(?:\+|\|\|)\s*|\s*(?:\+|\|\|)\s+")
_OPENING, _CLOSING = "([{", ")]}"


def split_list(text: str) -> tuple[str, ...]:
    """Names separated by commas; commas within brackets, as in ``PWN(a, b)``, belong to a name."""
    names, depth, start = [], 0, 0
    for index, character in enumerate(text):
        if character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth = max(0, depth - 1)
        elif character == "," and not depth:
            names.append(text[start:index])
            start = index + 1
    names.append(text[start:])
    return tuple(stripped for name in names if (stripped := name.strip()))


def profile_of(layer: str) -> int | None:
    """The profile that a layer's name says it is for; None when it says none, as for the first."""
    match = _PROFILE.search(layer)
    return int(match[1]) if match else None


def nodes_of(layer: str) -> frozenset[str]:
    """Names of the ONNX nodes that a layer's name joins: whole names, never parts of them."""
    name = _PROFILE.sub("", layer).strip()
    stretch = _STRETCH.fullmatch(name)
    if stretch:
        if "..." in stretch[1]:
            return frozenset()
        name = stretch[1]
    parts = (part.strip() for part in _FUSED.split(name))
    return frozenset(_COMPILED.sub("", part) for part in parts if part)
