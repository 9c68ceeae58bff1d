"""Which ONNX nodes run a sparse kernel, from the JSON of TensorRT's engine inspector.

The name of the kernel (``TacticName``) is the proof. ``HasSparseWeights`` is not: it is 1 for layers whose weights have the
pattern while a dense kernel runs (NVIDIA/TensorRT issue 4694). Layers are objects when the engine was built with detailed
profiling, else plain names, which say nothing. What one version calls ``Bindings`` is ``I/O Tensors`` in another; neither is
needed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compile_sparse.backends.tensorrt.sparsity.layer_names import nodes_of, profile_of

__all__ = ["Kernels", "kernels_by_profile"]

# sm80_xmma_sparse_gemm_..., ..._avdt_sparse_int8int8_..., ..._sptensor16x8x32, spmma and its kin.
_SPARSE_KERNEL = re.compile(r"sparse|sptensor|sp(?:h|i|q|o|u)?mma", re.IGNORECASE)
# Entries are joined with the control characters 0x1E and 0x1F, or with nothing.
_NODE_TAG = re.compile(r"\[ONNX Layer: (.+?)\](?=[\x1e\x1f\s\[]|\Z)")


@dataclass(frozen=True)
class Kernels:
    """What the inspector knows of one profile.

    Attributes:
        tactics: name of an ONNX node -> kernels that run it; empty names are kernels that the inspector does not name.
        why_unknown: why it knows nothing, a sentence; empty when it does.
    """

    tactics: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    why_unknown: str = ""

    def runs_sparse(self, node: str) -> bool | None:
        """Whether a sparse kernel runs the node; None when its kernels are not named, or the engine has no such node."""
        tactics = self.tactics.get(node, ())
        if any(_SPARSE_KERNEL.search(tactic) for tactic in tactics):
            return True
        return None if not tactics or "" in tactics else False


def kernels_by_profile(inspector_json: str, profiles: int) -> list[Kernels]:
    """Kernels of each optimization profile, in order.

    Layers of later profiles carry the suffix `` [profile N]``; without it a layer belongs to the first one.

    Args:
        inspector_json: what ``get_engine_information`` gave; may be empty.
        profiles: how many the engine has.
    """
    if not inspector_json.strip():
        return [Kernels(why_unknown="The engine was not inspected.")] * profiles
    try:
        document = json.loads(inspector_json, strict=False)  # names are joined with raw control characters
    except json.JSONDecodeError as error:
        return [Kernels(why_unknown=f"The inspector's answer is not JSON: {error}.")] * profiles
    layers = document.get("Layers") if isinstance(document, dict) else None
    if not isinstance(layers, list) or not layers:
        return [Kernels(why_unknown="The inspector lists no layers.")] * profiles
    detailed = [layer for layer in layers if isinstance(layer, dict)]
    if not detailed:
        why = "The inspector gives names only: the engine was built without detailed profiling verbosity."
        return [Kernels(why_unknown=why)] * profiles
    return [_kernels(detailed, profile) for profile in range(profiles)]


def _kernels(layers: list[dict[str, Any]], profile: int) -> Kernels:
    tactics: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        name = str(layer.get("Name", ""))
        if (profile_of(name) or 0) != profile:
            continue
        nodes = frozenset(_NODE_TAG.findall(str(layer.get("Metadata") or ""))) or nodes_of(name)
        for node in nodes:
            tactics[node] = (*tactics.get(node, ()), str(layer.get("TacticName") or ""))
    if not tactics:
        return Kernels(why_unknown=f"The inspector lists no layers of profile {profile}.")
    return Kernels(tactics)
