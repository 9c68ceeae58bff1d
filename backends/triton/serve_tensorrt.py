"""A model for Triton's tensorrt backend: one engine, of a model without a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compile_sparse.backends.tensorrt.description import Description, EngineRecord, Value, read_description
from compile_sparse.backends.triton.model_folder import ModelFolder
from compile_sparse.backends.triton.tensors import Tensor, instances, with_tensors
from compile_sparse.compiler.errors import Refusal

__all__ = ["aliased", "serve_tensorrt"]

_PLAN = "model.plan"


def serve_tensorrt(folder: ModelFolder) -> tuple[dict[str, Any], list[str]]:
    """Place the engine; the configuration and what to know.

    Raises:
        Refusal: CS4419 when the folder has no description; CS4621 to CS4624.
    """
    description = read_description(folder.model)
    if description.aliases:
        raise aliased()
    engine = _engine(folder, description)
    profiles = [entry.shapes for entry in description.profiles if entry.name in engine.profiles]
    # Triton refuses a batch that one of the profiles does not hold.
    largest = min((shape[2][0] for shapes in profiles for shape in shapes.values() if shape[2]), default=0)
    config, batched = with_tensors(_tensors(description.inputs), _tensors(description.outputs), largest)
    folder.place(engine.file, _PLAN)
    folder.place_side_files()
    group = instances("cuda")
    if len(profiles) > 1:
        group["profile"] = [str(place) for place in range(len(profiles))]
    if batched:
        config["dynamic_batching"] = {}
    limits = [
        f"The engine loads in a Triton whose TensorRT is {engine.version}, on a GPU of compute capability "
        f"{engine.compute_capability}."
    ]
    return {**config, "instance_group": [group], "default_model_filename": _PLAN}, limits


def aliased() -> Refusal:
    """CS4621: why the backend serves no decoder."""
    return Refusal(
        "CS4621",
        "Triton's tensorrt backend cannot serve a decoder.",
        where="--emit triton",
        why="The key-value cache is updated in place: each 'present' output must lie where its 'past' input lies, and the "
        "backend gives outputs memory of their own.",
        hint="Compile for a vllm-* target, which Triton's vllm backend serves, or serve the folder model/checkpoint with "
        "TensorRT-LLM.",
    )


def _engine(folder: ModelFolder, description: Description) -> EngineRecord:
    """The first engine of TensorRT proper, unchanged since it was built."""
    engine = next((entry for entry in description.engines if entry.builder == "tensorrt"), None)
    if engine is None:
        other = "Its engines are TensorRT-RTX's, which Triton's backend does not load." if description.engines else ""
        raise Refusal(
            "CS4622",
            "There is no TensorRT engine to deploy.",
            where="--emit triton",
            why=other or "None was built: that takes TensorRT and the target's GPU.",
            hint="Compile on a machine with the GPU, or for an ort-* target.",
        )
    digest = folder.digest(engine.file)
    if digest != engine.sha256:
        raise Refusal(
            "CS4623",
            "The engine is not the one that was built.",
            where=engine.file,
            why=f"Its sha256 starts with {digest[:12]}, recorded is {engine.sha256[:12]}.",
            hint="Compile again; an engine is code, and Triton runs it.",
        )
    return engine


def _tensors(entries: Sequence[Value]) -> tuple[Tensor, ...]:
    return tuple(Tensor(entry.name, entry.dtype, entry.shape) for entry in entries)
