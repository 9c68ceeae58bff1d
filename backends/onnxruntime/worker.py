"""The measuring process of ONNX Runtime: its sessions, for the operations of ``backends.worker``."""

from __future__ import annotations

import json
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime as ort

from compile_sparse.backends.worker.errors import RequestError
from compile_sparse.backends.worker.model import Array, Tokens, taken
from compile_sparse.backends.worker.models import ModelWorker
from compile_sparse.backends.worker.serve import serve
from compile_sparse.compiler.runtimes.messages import Runtime

__all__ = ["OnnxRuntimeWorker", "main"]

_PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


class Model:
    """One loaded folder."""

    def __init__(self, folder: str, threads: int, device: str) -> None:
        path = Path(folder) / "model.onnx"
        if not path.is_file():
            raise RequestError(f"there is no model.onnx in {folder}")
        if device not in _PROVIDERS:
            raise RequestError(f"unknown device {device!r}; known: {', '.join(_PROVIDERS)}")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Spinning threads starve each other on a busy machine and make timings depend on the neighbours.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if _saturates():
            options.add_session_config_entry("session.x64quantprecision", "1")
        self.session = ort.InferenceSession(str(path), options, providers=_PROVIDERS[device])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.past = [name for name in self.inputs if name.startswith("past_key_values.")]
        self.share_buffer = bool(self.past) and _shares_buffer(Path(folder))
        self.watched: dict[str, Array] = {}
        self._watched_names: list[str] = []
        self.cache_shapes = {name: _cache_shape(self.inputs[name].shape, Path(folder)) for name in self.past}

    def generation(self, batch: int, capacity: int) -> Generation:
        """See ``worker.model``, as for ``run``."""
        if not self.past or "logits" not in self.outputs or "input_ids" not in self.inputs:
            raise RequestError("this operation needs a decoder with a key-value cache")
        return Generation(self, batch, capacity)

    @contextmanager
    def watch(self, values: Collection[str]) -> Iterator[Mapping[str, Array]]:
        """The graph tells outputs only: what is watched must be one, as in the copies that are written for it."""
        self._watched_names = [name for name in self.outputs if name in set(values)]
        try:
            yield self.watched
        finally:
            self._watched_names, self.watched = [], {}

    @property
    def watched_names(self) -> Sequence[str]:
        """What is being watched."""
        return self._watched_names

    def keep_watched(self, found: Mapping[str, Array]) -> None:
        """Show the values of a call."""
        self.watched.clear()
        self.watched.update({name: np.asarray(found[name], np.float32) for name in self._watched_names})

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        found = dict(zip(self.outputs, self.session.run(self.outputs, taken(self.inputs, feeds)), strict=True))
        self.keep_watched(found)
        return found


def _saturates() -> bool:
    """Whether 8-bit multiply-add may overflow: x86 without dot-product instructions.

    The runtime then has exact kernels on request. They are asked for only here, because they halve the speed of prompts
    on processors that do not need them.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True  # unknown: right before fast


def _cache_shape(shape: Sequence[object], folder: Path) -> tuple[int, int]:
    """Cached heads and head size. Graphs of other tools may leave them open and say them in their configuration."""
    if isinstance(shape[1], int) and isinstance(shape[3], int):
        return shape[1], shape[3]
    config = folder / "genai_config.json"
    if not config.is_file():
        raise RequestError(f"the cache inputs have open dimensions {shape} and there is no genai_config.json")
    decoder = json.loads(config.read_text(encoding="utf-8"))["model"]["decoder"]
    return int(decoder["num_key_value_heads"]), int(decoder["head_size"])


def _shares_buffer(folder: Path) -> bool:
    """Whether past and present may be one buffer: our manifest says so, or the configuration of onnxruntime-genai."""
    manifest = folder / "compile_sparse.json"
    if manifest.is_file():
        return bool(json.loads(manifest.read_text(encoding="utf-8")).get("share_buffer", False))
    config = folder / "genai_config.json"
    if config.is_file():
        search = json.loads(config.read_text(encoding="utf-8")).get("search", {})
        return bool(search.get("past_present_share_buffer", False))
    return False


class Generation:
    """A batch of sequences of equal length growing through the cache.

    With a shared buffer, past and present are bound to the same ``capacity`` positions and nothing is copied; otherwise
    the outputs of a step are the inputs of the next one.
    """

    def __init__(self, model: Model, batch: int, capacity: int) -> None:
        self._model, self._batch, self._length = model, batch, 0
        self._cache = {}
        for name in model.past:
            spec = model.inputs[name]
            length = capacity if model.share_buffer else 0
            heads, size = model.cache_shapes[name]
            shape = (batch, heads, length, size)
            self._cache[name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, _TYPES[spec.type]))

    def step(self, ids: Tokens) -> Array:
        """Logits ``[B, S, V]`` of new tokens ``ids [B, S]``."""
        model, length = self._model, ids.shape[1]
        total = self._length + length
        binding = model.session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids, dtype=np.int64))
        if "attention_mask" in model.inputs:
            binding.bind_cpu_input("attention_mask", np.ones((self._batch, total), np.int64))
        if "position_ids" in model.inputs:
            positions = np.broadcast_to(np.arange(self._length, total, dtype=np.int64), (self._batch, length))
            binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        names = ["logits"]
        binding.bind_output("logits", "cpu")
        for name, value in self._cache.items():
            present = name.replace("past_key_values", "present")
            binding.bind_ortvalue_input(name, value)
            if model.share_buffer:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present, "cpu")
            names.append(present)
        for name in set(model.watched_names) - set(names):
            binding.bind_output(name, "cpu")
            names.append(name)
        model.session.run_with_iobinding(binding)
        results = dict(zip(names, binding.get_outputs(), strict=True))
        if not model.share_buffer:
            self._cache = {name: results[name.replace("past_key_values", "present")] for name in self._cache}
        self._length = total
        model.keep_watched({name: results[name].numpy() for name in model.watched_names})
        logits: Array = results["logits"].numpy()
        return logits


class OnnxRuntimeWorker(ModelWorker[Model]):
    """Answers for folders with ``model.onnx``."""

    def runtime(self) -> Runtime:
        device = "cuda" if "CUDAExecutionProvider" in ort.get_available_providers() else "cpu"
        return Runtime("onnxruntime", ort.__version__, device)

    def open(self, folder: str, threads: int, device: str) -> Model:
        return Model(folder, threads, device)


def main(arguments: Sequence[str] = ()) -> int:
    """Serve until shutdown or end of input."""
    return serve(OnnxRuntimeWorker().handlers())
