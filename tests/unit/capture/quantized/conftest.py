"""Checkpoints of a few tensors, read without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from compile_sparse.compiler.capture.quantized.reading import Method, Reading
from compile_sparse.compiler.capture.safetensors_reader import read_checkpoint

Read = Callable[[Method, Mapping[str, object]], Reading]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """What a method reads from these tensors (numpy's or torch's)."""

    def through(method: Method, tensors: Mapping[str, object]) -> Reading:
        kept = {
            name: (torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value).contiguous()  # type: ignore[attr-defined]
            for name, value in tensors.items()
        }
        save_file(kept, tmp_path / "model.safetensors")
        return method.read(read_checkpoint([tmp_path / "model.safetensors"], torch.float32))

    return through
