"""Run a lowered folder in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from compile_sparse.backends.onnxruntime.worker import _saturates

__all__ = ["run", "session"]


def session(folder: Path) -> ort.InferenceSession:
    """A single-threaded session on ``folder/model.onnx``."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if _saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(str(folder / "model.onnx"), options)


def run(loaded: ort.InferenceSession, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs by name; feeds the graph does not have are left out."""
    names = {value.name for value in loaded.get_inputs()}
    given = {name: np.ascontiguousarray(value.numpy()) for name, value in feeds.items() if name in names}
    outputs = [value.name for value in loaded.get_outputs()]
    return {name: torch.from_numpy(value) for name, value in zip(outputs, loaded.run(None, given), strict=True)}
