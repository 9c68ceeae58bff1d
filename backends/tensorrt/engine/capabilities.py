"""Which compute capability a builder can build for, when it is not the GPU's own.

TensorRT builds for the GPU it runs on. TensorRT-RTX builds for named capabilities without a GPU, and has names for fewer of
them than there are GPUs: the others are built for as the nearest one. What such a build shows is that the graph is accepted and
that its number formats exist there; its engine does not run on the GPU meant.
"""

from __future__ import annotations

from dataclasses import dataclass

from compile_sparse.compiler.errors import Refusal

__all__ = ["BuiltFor", "built_for"]

_BY_NAME = {"8.0": "SM80", "8.6": "SM86", "8.9": "SM89", "12.0": "SM120"}
# The substitute has the formats of the GPU meant, as far as the builder knows any that has: FP8 for 9.0, FP4 for 10.0.
_SUBSTITUTES = {"8.7": "8.6", "9.0": "8.9", "10.0": "12.0"}


@dataclass(frozen=True)
class BuiltFor:
    """What TensorRT-RTX builds for.

    Attributes:
        compute_capability: of the GPUs that the engine runs on, such as '8.9'.
        name: the builder's name of it, such as 'SM89'.
        substitute: a sentence when it is not the capability asked for, else empty.
    """

    compute_capability: str
    name: str
    substitute: str = ""


def built_for(compute_capability: str) -> BuiltFor:
    """What TensorRT-RTX builds when ``compute_capability`` is asked for.

    Raises:
        Refusal: CS4410 when it has nothing like it.
    """
    found = _SUBSTITUTES.get(compute_capability, compute_capability)
    if found not in _BY_NAME:
        known = sorted({*_BY_NAME, *_SUBSTITUTES}, key=lambda text: [int(part) for part in text.split(".")])
        raise Refusal(
            "CS4410",
            f"TensorRT-RTX cannot build for compute capability {compute_capability}.",
            where=f"compute capability {compute_capability}",
            why=f"It can for {', '.join(known)}.",
            hint="Choose another target, or build the ONNX file with TensorRT on the GPU itself.",
        )
    substitute = ""
    if found != compute_capability:
        substitute = (
            f"TensorRT-RTX cannot build for compute capability {compute_capability}; {found} stood in. Formats and operators "
            "were checked with it; the engine runs on the stand-in only."
        )
    return BuiltFor(found, _BY_NAME[found], substitute)
