"""The unified Hugging Face checkpoint, in ModelOpt's format: what TensorRT-LLM's PyTorch backend loads.

It is written beside an engine, so what it cannot say is no reason to fail: the folder stays empty and a ``Diagnostic`` says why.
Nothing is rounded again to make it fit. No reader of it was run on a GPU by this project.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from compile_sparse.backends.checkpoint.architecture import architecture_of
from compile_sparse.backends.checkpoint.checkpoint import write_checkpoint
from compile_sparse.backends.checkpoint.modelopt_contract import algorithm_of, joined, require_expressible
from compile_sparse.backends.checkpoint.modelopt_layout import (
    Algorithm,
    encoded,
    hf_quant_config,
    quantization_config,
)
from compile_sparse.backends.checkpoint.quantized_tensor import dequantized
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.files.digests import digest_file
from compile_sparse.compiler.files.durable import write_durably
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.quantized_tensor import QuantizedTensor
from compile_sparse.compiler.ir.storage import stored_form
from compile_sparse.compiler.ir.weights import DerivedTensor, TensorSource
from compile_sparse.compiler.progress import Progress

__all__ = ["write_unified"]

CONFIG_FILE = "config.json"
QUANTIZATION_FILE = "hf_quant_config.json"
_WEIGHT = ".weight"


def write_unified(program: Program, out: Path, progress: Progress) -> tuple[dict[str, str], list[Diagnostic]]:
    """Write config, weights and tokenizer files into the empty folder ``out``; memory follows the largest tensor.

    Returns:
        File name -> SHA-256, empty when the program cannot be expressed (``out`` is empty then); and the reasons (CS46xx, or
        CS42xx and CS43xx where the model's class or a quantized form is the obstacle), or what readers will do with it (CS2361,
        CS2362).

    Raises:
        ModelError: CS2001 when the program was captured without weights.
    """
    try:
        return _written(program, out, progress)
    except Refusal as error:
        for path in out.iterdir():  # a scale may turn out to be unfit after other tensors are written
            path.unlink()
        return {}, [Diagnostic.of(error)]


def _written(program: Program, out: Path, progress: Progress) -> tuple[dict[str, str], list[Diagnostic]]:
    require_expressible(program)
    view, quantized = dequantized(program)
    algorithm = algorithm_of(view, quantized)
    if algorithm is None:
        return dict(write_checkpoint(program, out, progress).files), []
    dtype = _computes_in(view)
    writer = _Writer(
        algorithm, dtype, alone={id(quantized[n[0]]) for n in joined(view) if len(n) == 1 and n[0] in quantized}
    )
    written = write_checkpoint(view, out, progress, encode=writer.encode, dtype=dtype)
    writer.require_all(quantized)
    excluded = _others(view, writer.stored)
    config = json.loads((out / CONFIG_FILE).read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(algorithm, excluded)
    own = hf_quant_config(algorithm, excluded)
    for name, content in ((CONFIG_FILE, config), (QUANTIZATION_FILE, own)):
        write_durably(out / name, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    digests = {name: digest_file(out / name)[0] for name in (CONFIG_FILE, QUANTIZATION_FILE)}
    return {**written.files, **digests}, [*_unread(algorithm), *writer.rescaled(view, quantized)]


class _Writer:
    """Turns quantized tensors into tensors of the file, and remembers their names and the scales of FP8 weights.

    Args:
        algorithm: how they are stored.
        dtype: what the model computes in.
        alone: identities of the quantized tensors that no reader joins with others.
    """

    def __init__(self, algorithm: Algorithm, dtype: torch.dtype, *, alone: Collection[int]) -> None:
        self._algorithm, self._dtype, self._alone = algorithm, dtype, alone
        self.stored: dict[str, QuantizedTensor] = {}
        self._scales: dict[int, float] = {}

    def encode(self, name: str, source: TensorSource) -> Mapping[str, TensorSource]:
        """What stands for ``name`` in the file."""
        if not isinstance(source, QuantizedTensor):
            return {name: source}
        self.stored[name] = source
        made = encoded(name, source, self._algorithm, dtype=self._dtype, alone=id(source) in self._alone)
        if self._algorithm == "FP8":
            scale = f"{name.removesuffix(_WEIGHT)}.weight_scale"
            inner = made[scale]
            made[scale] = DerivedTensor((), torch.float32, lambda: self._noted(source, inner.load()))
        return made

    def _noted(self, source: QuantizedTensor, scale: torch.Tensor) -> torch.Tensor:
        self._scales[id(source)] = float(scale)
        return scale

    def require_all(self, quantized: Mapping[str, QuantizedTensor]) -> None:
        """Raise CS4304 when a quantized tensor did not reach the file as codes."""
        if len(self.stored) != len(quantized):
            raise Refusal(
                "CS4304",
                "A weight cannot be stored in a checkpoint in this form.",
                where=next(iter(quantized)),
                why=f"transformers stores {len(quantized) - len(self.stored)} of {len(quantized)} such weights in another form "
                "than it computes with, and codes cannot be converted.",
                hint="Leave --quantize out.",
            )

    def rescaled(self, view: Program, quantized: Mapping[str, QuantizedTensor]) -> list[Diagnostic]:
        """CS2362 when readers would change codes: they join layers and keep the largest of their scales."""
        worst, where = 1.0, ""
        for names in joined(view) if self._scales else ():
            scales = [self._scales[id(quantized[name])] for name in names if name in quantized]
            if scales and min(scales) > 0 and max(scales) / min(scales) > worst:
                worst, where = max(scales) / min(scales), names[0]
        if not where:
            return []
        why = (
            "The checkpoint is exact, but TensorRT-LLM and vLLM join layers with the same input (query, key and value; gate and "
            f"up), keep the largest of their scales and round the codes of the others again: they differ by up to {worst:.3g}x."
        )
        return [Diagnostic(where, "CS2362", why)]


def _computes_in(view: Program) -> torch.dtype:
    """The widest type of the weights that are not quantized."""
    stored = {
        stored_form(source).dtype
        for binding in view.bindings.values()
        if binding.kind == "parameter" and not isinstance(source := view.weights[binding.tensor], QuantizedTensor)
    }
    return max((d for d in stored if d.is_floating_point), key=lambda d: d.itemsize, default=torch.float32)


def _others(view: Program, stored: Mapping[str, QuantizedTensor]) -> list[str]:
    """Linear layers and embeddings of the class that are not quantized, by module name; those of removed layers are not there."""
    architecture = architecture_of(view.config)
    model = architecture.on_meta(architecture.parsed(architecture.config))
    own = {name.removesuffix(_WEIGHT) for name in stored}
    blocks = {_block(name) for name in own}
    named = [
        name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
    ]
    return [name for name in named if name not in own and (_block(name) in blocks or name.count(".") < 3)]


def _block(name: str) -> str:
    return ".".join(name.split(".")[:3])


def _unread(algorithm: Algorithm) -> list[Diagnostic]:
    """CS2361 for formats that not every reader has."""
    lacking = {
        "W4A16_AWQ": "vLLM 0.32 and SGLang have no loader for W4A16_AWQ in ModelOpt's layout; TensorRT-LLM has.",
        "W8A8_SQ_PER_CHANNEL": "ModelOpt writes this layout, but neither TensorRT-LLM's PyTorch backend nor vLLM 0.32 loads it.",
    }
    return [Diagnostic(QUANTIZATION_FILE, "CS2361", lacking[algorithm])] if algorithm in lacking else []
