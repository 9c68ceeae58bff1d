"""Whether a checkpoint is quantized, and how: said by ``config.json`` or by a file beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compile_sparse.compiler.capture.quantized.awq import read_awq
from compile_sparse.compiler.capture.quantized.compressed_tensors import CompressedTensors
from compile_sparse.compiler.capture.quantized.compressed_tensors_config import CONFIG, read_config
from compile_sparse.compiler.capture.quantized.fp8 import read_fp8
from compile_sparse.compiler.capture.quantized.gptq import read_gptq
from compile_sparse.compiler.capture.quantized.modelopt import read_modelopt
from compile_sparse.compiler.capture.quantized.mxfp4 import Mxfp4
from compile_sparse.compiler.capture.quantized.reading import Method, misfit, unread
from compile_sparse.compiler.files.json_object import read_object

__all__ = ["QUANTIZATION_FILES", "find_method", "without_quantization"]

_KEYS = ("quantization_config", "compression_config")
_PARTS = ("text_config", "language_config", "llm_config")
MODELOPT_FILE, GPTQ_FILE, AWQ_FILE = "hf_quant_config.json", "quantize_config.json", "quant_config.json"
QUANTIZATION_FILES = (MODELOPT_FILE, GPTQ_FILE, AWQ_FILE)
"""Files beside ``config.json`` that may say how a checkpoint is quantized."""
_MAX_BYTES = 16 * 1024 * 1024

_NAMES = {
    "bitsandbytes": "bitsandbytes",
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "bitnet": "BitNet",
    "eetq": "EETQ",
    "fbgemm_fp8": "FBGEMM FP8",
    "fp_quant": "FP-Quant",
    "gguf": "GGUF",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "quanto": "Quanto",
    "quark": "AMD Quark",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
"""Methods that are not read, as people call them; others go by their own name."""
_READERS: Mapping[str, Callable[[Any], Method]] = {
    "compressed-tensors": lambda raw: CompressedTensors(read_config(raw)),
    "compressed_tensors": lambda raw: CompressedTensors(read_config(raw)),
    "gptq": lambda raw: read_gptq(raw, CONFIG),
    "awq": lambda raw: read_awq(raw, CONFIG),
    "fp8": lambda raw: read_fp8(raw, CONFIG),
    "mxfp4": lambda raw: Mxfp4(),
}
_READ = "compressed-tensors, GPTQ, AWQ, ModelOpt, FP8 (blocks, or one scale per weight) and MXFP4"


def find_method(raw: Mapping[str, Any], folder: Path) -> Method | None:
    """The method of the checkpoint in ``folder`` whose config.json is ``raw``; None for one that is not quantized.

    Raises:
        ModelError: CS2020 for a method or form that is not read, by name; CS2021 for a description that is not one.
    """
    described = _described(raw)
    if described is None:
        return _from_files(folder)
    if not isinstance(described, Mapping):
        raise misfit(CONFIG, f"It is {type(described).__name__}, not an object.")
    method = _method_name(described)
    if method == "modelopt":
        beside = _beside(folder, MODELOPT_FILE)
        return read_modelopt(described if beside is None else beside.get("quantization", beside), CONFIG)
    if method in _READERS:
        return _READERS[method](described)
    name = _NAMES.get(method, method or "a method that config.json does not name")
    raise unread(
        f"This model is quantized with {name}, which this version does not read.",
        where=CONFIG,
        why=f"It reads {_READ}.",
    )


def without_quantization(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of the model as such: what is compiled is described by its tensors."""
    plain = {key: value for key, value in raw.items() if key not in _KEYS}
    for part in _PARTS:
        if isinstance(plain.get(part), dict):
            plain[part] = {key: value for key, value in plain[part].items() if key not in _KEYS}
    return plain


def _described(raw: Mapping[str, Any]) -> Any:
    for place in (raw, *(raw[part] for part in _PARTS if isinstance(raw.get(part), dict))):
        found = next((place[key] for key in _KEYS if place.get(key)), None)
        if found is not None:
            return found
    return None


def _method_name(described: Mapping[str, Any]) -> str:
    """In lower case; inferred where older writers named none."""
    named = described.get("quant_method")
    producer = described.get("producer")
    if isinstance(producer, Mapping) and producer.get("name") == "modelopt":
        return "modelopt"
    if named:
        lower = str(named).lower()
        return "modelopt" if lower.startswith("modelopt") else lower
    if described.get("load_in_4bit") or described.get("load_in_8bit"):
        return "bitsandbytes"
    return "compressed-tensors" if "config_groups" in described else ""


def _from_files(folder: Path) -> Method | None:
    """Of older writers, who said it beside config.json."""
    if (found := _beside(folder, MODELOPT_FILE)) is not None:
        return read_modelopt(found.get("quantization", found), MODELOPT_FILE)
    if (found := _beside(folder, GPTQ_FILE)) is not None and "bits" in found:
        return read_gptq(found, GPTQ_FILE)
    if (found := _beside(folder, AWQ_FILE)) is not None and "w_bit" in found:
        return read_awq(found, AWQ_FILE)
    return None


def _beside(folder: Path, name: str) -> dict[str, Any] | None:
    file = folder / name
    if not file.is_file():
        return None
    try:
        return read_object(file, most=_MAX_BYTES)
    except (ValueError, RecursionError, OSError) as error:
        raise misfit(name, f"It cannot be read: {error}.") from error
