"""What other backends write, as far as a repository needs it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from compile_sparse.backends.vllm.plugin_files import PLUGIN_FOLDER

# -- tensorrt


def engine_folder(folder: Path, **changes: Any) -> Path:
    """A lowered encoder with an engine, as far as a repository reads it."""
    model = folder / "model"
    model.mkdir()
    (model / "model.engine").write_bytes(b"plan")
    engine = {
        "file": "model.engine",
        "sha256": hashlib.sha256(b"plan").hexdigest(),
        "bytes": 4,
        "builder": "tensorrt",
        "version": "11.4.0",
        "compute_capability": "8.0",
        "profiles": ["samples"],
    }
    shapes = {"input_ids": [[1, 1], [8, 128], [32, 512]], "attention_mask": [[1, 1], [8, 128], [16, 512]]}
    description = {
        "kind": "text",
        "precision": "fp16",
        "inputs": [{"name": name, "dtype": "int64", "shape": ["batch_size", "sequence_length"]} for name in shapes],
        "outputs": [{"name": "logits", "dtype": "float16", "shape": ["batch_size", 3]}],
        "aliases": {},
        "profiles": [{"name": "samples", "shapes": shapes}],
        "engines": [{**engine, **changes.pop("engine", {})}],
    }
    (model / "compile_sparse.json").write_text(json.dumps({**description, **changes}), encoding="utf-8")
    return model


# -- vllm


def checkpoint(folder: Path) -> Path:
    model = folder / "model"
    (model / PLUGIN_FOLDER).mkdir(parents=True)
    (model / "config.json").write_text("{}", encoding="utf-8")
    (model / "model.safetensors").write_bytes(b"weights")
    (model / PLUGIN_FOLDER / "entry.py").write_text("", encoding="utf-8")
    return model
