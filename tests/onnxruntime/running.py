"""Run a lowered folder in ONNX Runtime, and the tolerance it is held to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from compile_sparse.backends.onnxruntime.worker import _saturates

__all__ = ["fp32_tolerance", "run", "session"]


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


def fp32_tolerance(expected: torch.Tensor, width: int = 88, depth: int = 9) -> float:
    """Two float32 orders of summation of ``width`` terms differ by about ``eps * sqrt(width)`` of the value.

    ``depth`` matrix products in a row (four per layer and the head) add up in the worst case.
    """
    return float(torch.finfo(torch.float32).eps * width**0.5 * depth * expected.abs().max())
