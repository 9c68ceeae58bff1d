"""The emitted graph in ONNX Runtime on a processor: what it computes, where there is no GPU to run its engine.

Numbers only: its speed says nothing of the target. ONNX Runtime computes in 16 bits where it has such kernels and in float32
between conversions elsewhere, so its logits are at least as exact as the engine's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from compile_sparse.backends.onnx.external_data import MODEL_FILE
from compile_sparse.backends.tensorrt.description import Description, Value, read_description
from compile_sparse.backends.tensorrt.run.portable import portable_model
from compile_sparse.backends.worker.errors import RequestError
from compile_sparse.backends.worker.model import Array, Tokens, taken

__all__ = ["ReferenceRuntime", "StaticCache"]

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class ReferenceRuntime:
    """One loaded folder, a ``worker.model.Model``.

    Args:
        folder: with ``model.onnx`` and its description.
        threads: of one call.

    Raises:
        RequestError: ONNX Runtime cannot run the graph.
        Refusal: CS4419 the folder has no description.
    """

    share_buffer = False

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime as ort

        self.description = read_description(folder)
        path = folder / MODEL_FILE
        if not path.is_file():
            raise RequestError(f"there is no {MODEL_FILE} in {folder}")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # The graph as it is: what the optimizer makes of quantizers around a reshape does not load (ONNX Runtime 1.31).
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder.resolve()))
        portable = portable_model(path)
        # The session reads these where they are: they live as long as it does.
        self._widened = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in portable.widened.items()}
        if self._widened:
            options.add_external_initializers(list(self._widened), list(self._widened.values()))
        try:
            self._session = ort.InferenceSession(portable.model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own types derive from Exception alone
            raise RequestError(
                f"ONNX Runtime on a processor cannot stand in for TensorRT here (precision {self.description.precision}): "
                f"{error}"
            ) from error
        self.inputs = {value.name: _as_run(value) for value in self.description.inputs}
        if self.inputs.keys() != (found := {value.name for value in self._session.get_inputs()}):
            raise RequestError(f"the description has the inputs {sorted(self.inputs)}, the graph {sorted(found)}")
        self.outputs = [value.name for value in self._session.get_outputs()]

    def generation(self, batch: int, capacity: int) -> StaticCache:
        """``batch`` empty sequences that will not grow beyond ``capacity`` tokens."""
        require_decoder(self.description)
        return StaticCache(self, batch, capacity)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs of one call; 16-bit floats as float32, which holds them exactly."""
        cast = {name: np.asarray(value, self.inputs[name].dtype) for name, value in taken(self.inputs, feeds).items()}
        results = self.step(cast)
        return {n: value.astype(np.float32) if value.dtype == np.float16 else value for n, value in results.items()}

    def step(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name, in their own types."""
        return dict(zip(self.outputs, self._session.run(self.outputs, dict(feeds)), strict=True))


def _as_run(value: Value) -> Value:
    """numpy has no bfloat16; the graph is run with float32 in its place."""
    return value.model_copy(update={"dtype": "float32"}) if value.dtype == "bfloat16" else value


def require_decoder(description: Description) -> None:
    """Raise unless the graph takes ids and a cache and gives logits.

    Raises:
        RequestError: it does not.
    """
    names = {value.name for value in description.inputs}
    if not description.aliases or not {"input_ids", "write_indices"} <= names:
        raise RequestError("this operation needs a decoder with a key-value cache")


def cache_shape(value: Value, batch: int) -> tuple[int, ...]:
    """Shape of a cache input for ``batch`` sequences: every other dimension is a number."""
    rest = value.shape[1:]
    fixed = tuple(size for size in rest if isinstance(size, int))
    if len(fixed) < len(rest):
        raise RequestError(f"the cache {value.name} has open dimensions {value.shape}")
    return (batch, *fixed)


class StaticCache:
    """A batch of sequences of equal length, growing in buffers of fixed length: outputs of a step are the next one's inputs."""

    def __init__(self, model: ReferenceRuntime, batch: int, capacity: int) -> None:
        longest = model.description.max_length
        if longest is not None and capacity > longest:
            raise RequestError(f"{capacity} tokens do not fit the cache, which holds {longest}")
        self._model, self._length = model, 0
        self._past = {
            past: np.zeros(cache_shape(model.inputs[past], batch), model.inputs[past].dtype)
            for past in model.description.aliases.values()
        }
        self._batch, self._capacity = batch, capacity

    def step(self, ids: Tokens) -> Array:
        """Logits ``[B, S, V]`` in float32 of new tokens ``ids [B, S]``."""
        if self._length + ids.shape[1] > self._capacity:
            raise RequestError(f"the sequences grow beyond the {self._capacity} tokens that were announced")
        feeds = {
            "input_ids": np.ascontiguousarray(ids, np.int64),
            "write_indices": np.full(self._batch, self._length, np.int64),
            **self._past,
        }
        results = self._model.step(feeds)
        self._past = {past: results[present] for present, past in self._model.description.aliases.items()}
        self._length += ids.shape[1]
        return results["logits"].astype(np.float32)
