"""A model for Triton's vllm backend: ``model.json`` with the engine's arguments, and the checkpoint it names."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any

from compile_sparse.backends.triton.model_folder import ModelFolder
from compile_sparse.backends.triton.text_format import Word
from compile_sparse.backends.vllm.plugin_files import PLUGIN_FOLDER
from compile_sparse.compiler.files.digests import list_files

__all__ = ["serve_vllm"]

_ARGUMENTS, _CHECKPOINT = "model.json", "checkpoint"


def serve_vllm(folder: ModelFolder, device: str, gpus: int, mounted_at: str) -> tuple[dict[str, Any], list[str]]:
    """Place the files; the configuration and what to know.

    The configuration is that of the backend's own sample, with ``stream`` optional as the backend declares it. ``model`` in
    ``model.json`` goes to vLLM as it is: the path where Triton sees the checkpoint, or a name on a hub.
    """
    for path in list_files(folder.model):
        folder.place(path, f"{_CHECKPOINT}/{path}")
    checkpoint = PurePosixPath(mounted_at) / folder.name / folder.version / _CHECKPOINT
    arguments: dict[str, Any] = {"model": str(checkpoint)}
    if gpus > 1:
        arguments["tensor_parallel_size"] = gpus
    folder.write(_ARGUMENTS, json.dumps(arguments, indent=2) + "\n")
    text, truth = Word("TYPE_STRING"), Word("TYPE_BOOL")
    config = {
        "max_batch_size": 0,  # vLLM batches by itself
        "model_transaction_policy": {"decoupled": True},
        "input": [
            {"name": "text_input", "data_type": text, "dims": [1]},
            {"name": "stream", "data_type": truth, "dims": [1], "optional": True},
            {"name": "sampling_parameters", "data_type": text, "dims": [1], "optional": True},
            {"name": "exclude_input_in_output", "data_type": truth, "dims": [1], "optional": True},
        ],
        "output": [{"name": "text_output", "data_type": text, "dims": [-1]}],
        "instance_group": [{"count": 1, "kind": Word("KIND_MODEL")}],
    }
    limits = [
        f"Triton must see the repository at {mounted_at} (docker run -v ARTIFACT/triton:{mounted_at}): vLLM takes an absolute "
        f"path, and {folder.name}/{folder.version}/{_ARGUMENTS} names {checkpoint}. Elsewhere, change that line."
    ]
    if (folder.model / PLUGIN_FOLDER).is_dir():
        limits.append(f"Start Triton with {checkpoint / PLUGIN_FOLDER} on PYTHONPATH: vLLM needs the plugin in it.")
    if device == "cpu":
        limits.append("Triton's container with vLLM is for GPUs; on a processor it needs a vLLM built for it.")
    return config, limits
