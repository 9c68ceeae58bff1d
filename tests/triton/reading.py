"""A written repository as Triton reads it, and requests that its configuration allows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from compile_sparse.backends.triton.repository import Repository, write_repository
from tests.triton.protobuf import definition, parsed

NUMPY = {
    "TYPE_BOOL": np.bool_,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP16": np.float16,
    "TYPE_FP32": np.float32,
}
SIZES = {"batch": 3, "tokens": 5}


def repository(model: Path, backend: str = "onnxruntime", **options: Any) -> tuple[Path, Repository, Any]:
    """The folder of the served model, what was returned, and the configuration as Triton reads it."""
    out = model.parent / f"triton-{len(list(model.parent.iterdir()))}"
    options = {"name": "served", "device": "cpu", **options}
    written = write_repository(model, out, backend=backend, **options)  # type: ignore[arg-type]
    return out / "served", written, parsed((out / "served" / "config.pbtxt").read_text(encoding="utf-8"))


def type_name(entry: Any) -> str:
    return str(definition().DataType.Name(entry.data_type))


def tensors(entries: Any) -> dict[str, tuple[str, list[int]]]:
    return {entry.name: (type_name(entry), list(entry.dims)) for entry in entries}


def requests(config: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors made from the configuration alone, as a client would: the batch in front, and a length where sizes are open."""
    found = {}
    for entry in config.input:
        sizes = [SIZES["tokens"] if size == -1 else size for size in entry.dims]
        if entry.HasField("reshape"):
            sizes = list(entry.reshape.shape)
        shape = [*([min(SIZES["batch"], config.max_batch_size)] if config.max_batch_size else []), *sizes]
        found[entry.name] = np.ones(shape, NUMPY[type_name(entry)])
    return found


def answers(folder: Path, given: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(str(folder / "1" / "model.onnx"), options)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(given)), strict=True))


def agrees(config: Any, found: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Every output has the configuration's name, type and sizes."""
    assert list(found) == [entry.name for entry in config.output]
    for entry in config.output:
        value = found[entry.name]
        sizes = list(value.shape[1 if config.max_batch_size else 0 :])
        assert value.dtype == NUMPY[type_name(entry)], entry.name
        assert len(sizes) == len(entry.dims) and all(d in (-1, s) for d, s in zip(entry.dims, sizes, strict=True))


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder.parent).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
