"""Triton's own definition of a model configuration, from its client package."""

from __future__ import annotations

import importlib.util
from functools import cache
from importlib.metadata import files
from pathlib import Path
from typing import Any

from google.protobuf import text_format

__all__ = ["definition", "parsed"]

_MODULE = "tritonclient/grpc/model_config_pb2.py"


@cache
def definition() -> Any:
    """The generated module, loaded by its path: importing its package needs grpc, which nothing here calls."""
    path = next(file.locate() for file in files("tritonclient") or () if file.as_posix() == _MODULE)
    spec = importlib.util.spec_from_file_location("triton_model_config_pb2", Path(str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(text: str) -> Any:
    """A ``ModelConfig``. Raises ``google.protobuf.text_format.ParseError`` for anything that is none."""
    return text_format.Parse(text, definition().ModelConfig())
