"""A model for Triton's onnxruntime backend: ``model.onnx`` with its weights beside it."""

from __future__ import annotations

from typing import Any

from compile_sparse.backends.triton.model_folder import ModelFolder
from compile_sparse.backends.triton.onnx_model import read_onnx
from compile_sparse.backends.triton.tensors import instances, with_tensors

__all__ = ["serve_onnxruntime"]

_MODEL = "model.onnx"
_CACHE = "past_key_values."


def serve_onnxruntime(folder: ModelFolder, device: str, largest_batch: int) -> tuple[dict[str, Any], list[str]]:
    """Place the files; the configuration and what to know.

    Triton's backend adds a dynamic batcher to every model whose ``max_batch_size`` is above 1, so that number is 1 where rows of
    a batch influence each other.

    Raises:
        Refusal: CS4624, CS4625.
        EnvironmentFailure: CS5012.
    """
    found = read_onnx(folder.model / _MODEL)
    folder.place(_MODEL, _MODEL)
    for name in found.data_files:
        # onnx's own loader takes a second link to a weight file for an attack, in both folders.
        folder.place(name, name, link=False)
    folder.place_side_files()
    config, batched = with_tensors(found.inputs, found.outputs, 1 if found.coupling else largest_batch)
    caches = [tensor for tensor in found.inputs if tensor.name.startswith(_CACHE)]
    limits = []
    if found.coupling and batched:
        limits.append(
            f"Triton computes one request at a time (max_batch_size 1): {found.coupling}. Its onnxruntime backend batches "
            "requests by itself wherever max_batch_size is larger."
        )
    if caches:
        limits.append(
            f"The key-value cache is {len(caches)} ordinary inputs and as many outputs: a client sends every 'present' back as "
            "the next 'past', the first of length 0 where lengths grow (not tried with a server). For serving text, a vLLM "
            "target moves no cache."
        )
    if batched and not found.coupling and not caches:
        config["dynamic_batching"] = {}
    return {**config, "instance_group": [instances(device)], "default_model_filename": _MODEL}, limits
