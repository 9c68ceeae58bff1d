"""How a program's weights are stored for vLLM: as they are, quantized, as factors, or as 2:4 values and positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from compile_sparse.backends.checkpoint.architecture import architecture_of
from compile_sparse.backends.checkpoint.compressed_tensors import WEIGHT, encoded, quantization_config
from compile_sparse.backends.checkpoint.quantized_tensor import dequantized
from compile_sparse.backends.checkpoint.tensors import Tensors
from compile_sparse.backends.vllm.cache_scales import CACHE_SCHEME, cache_scales
from compile_sparse.backends.vllm.factored import FactoredTensor, multiplied
from compile_sparse.backends.vllm.sparse24 import SPARSE_RUN, LastCompressed, SparseTensor, compressible
from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.quantization_schemes import Scheme
from compile_sparse.compiler.ir.quantized_tensor import QuantizedTensor
from compile_sparse.compiler.ir.storage import stored_form
from compile_sparse.compiler.ir.weights import TensorSource

__all__ = ["Storage", "StorageWriter", "storage_of"]

SPARSE_METHOD, LOW_RANK_METHOD = "compile_sparse_24", "compile_sparse_low_rank"
"""Names of our plugin's quantization methods."""


@dataclass(frozen=True)
class Storage:
    """A program as its class computes it, and what is stored in another way.

    Attributes:
        view: without quantize nodes, factors multiplied out: every weight has the place the model's class gives it.
        quantized, factored, sparse: weights that are stored otherwise, by tensor name.
        scales: of a quantized key-value cache, by the weight of the projection beside which they lie and their kind.
    """

    view: Program
    quantized: Mapping[str, QuantizedTensor] = field(default_factory=dict)
    factored: Mapping[str, FactoredTensor] = field(default_factory=dict)
    sparse: Mapping[str, SparseTensor] = field(default_factory=dict)
    scales: Mapping[tuple[str, str], TensorSource] = field(default_factory=dict)

    @property
    def own_method(self) -> bool:
        """Whether the weights are in a format of our plugin."""
        return bool(self.factored or self.sparse)

    @property
    def scheme(self) -> Scheme | None:
        """Of the quantized weights, None without."""
        return next((tensor.scheme for tensor in self.quantized.values()), None)

    def require_one_method(self, gpus: int) -> None:
        """vLLM takes one format per checkpoint.

        Raises:
            Refusal: CS4304 for mixtures; CS4308 for factors that would be split over GPUs.
        """
        schemes = len({tensor.scheme for tensor in self.quantized.values()})
        if schemes > 1:
            why = (
                f"{schemes} different ones; vLLM's fused layers need one, and mixtures are not written by this version."
            )
            raise Refusal(
                "CS4304",
                "The model mixes quantization schemes.",
                where="quantize",
                why=why,
                hint="Quantize all linear layers alike.",
            )
        if self.factored and (self.quantized or self.scales):
            raise Refusal(
                "CS4304",
                "Low-rank layers cannot be quantized in vLLM.",
                where="low-rank",
                why="Factors are stored in a format of our vLLM plugin, and vLLM takes one format per checkpoint.",
                hint="Leave one of them out, or compile for ort-cpu, which takes both.",
            )
        uneven = next((name for name, tensor in self.sparse.items() if tensor.shape[1] % (SPARSE_RUN * gpus)), None)
        if uneven:
            raise Refusal(
                "CS4308",
                "2:4 weights cannot be split over these GPUs.",
                where=uneven,
                why=f"Positions are stored {SPARSE_RUN // 2} to a byte, for {SPARSE_RUN} inputs; its "
                f"{self.sparse[uneven].shape[1]} inputs are no multiple of {SPARSE_RUN * gpus}.",
                hint="Use fewer GPUs, or leave --sparsity out.",
            )
        if self.factored and gpus > 1:
            raise Refusal(
                "CS4308",
                "Low-rank layers cannot be split over GPUs.",
                where=f"--tensor-parallel {gpus}",
                why="The plugin's low-rank layers run on one GPU only.",
                hint="Leave one of the two options out.",
            )


def storage_of(program: Program) -> Storage:
    """Take a program apart.

    Raises:
        Refusal: CS4304 for codes in a form that no checkpoint format has.
    """
    view, quantized = dequantized(program)
    view, factored = multiplied(view)
    scales = cache_scales(program)
    # vLLM takes one format per checkpoint: beside quantized weights or scales zeros are stored as they are.
    sparse = {} if quantized or factored or scales else compressible(view)
    if sparse:
        view = replace(view, weights=view.weights.updated(dict(sparse)))
    return Storage(view, quantized, factored, sparse, scales)


class StorageWriter:
    """Turns tensors of the view into tensors of the file, and remembers under which names.

    Args:
        form: what is stored.
        dtype: of weights and of the scales of weight-only formats.
    """

    def __init__(self, form: Storage, dtype: torch.dtype) -> None:
        self._form, self._dtype = form, dtype
        self._quantized: list[str] = []
        self._ranks: dict[str, int] = {}
        self._sparse: list[str] = []
        self._compressed = LastCompressed()

    def encode(self, name: str, source: TensorSource) -> Mapping[str, TensorSource]:
        """What stands for ``name`` in the file."""
        stem = name.removesuffix(WEIGHT)
        if isinstance(source, QuantizedTensor):
            self._quantized.append(name)
            return encoded(name, source, self._dtype)
        if isinstance(source, FactoredTensor):
            self._ranks[stem] = source.inner.shape[0]
            return {f"{stem}.weight_a": stored_form(source.inner), f"{stem}.weight_b": stored_form(source.outer)}
        if isinstance(source, SparseTensor):
            self._sparse.append(name)
            return source.encoded(stem, self._dtype, self._compressed)
        return {name: source}

    def beside(self, tensors: Tensors) -> Mapping[str, TensorSource]:
        """Scales of the cache, beside the projections of their attention."""
        made = {
            f"{tensors.renamed[weight].rsplit('.', 2)[0]}.{kind}": scale
            for (weight, kind), scale in self._form.scales.items()
        }
        if len(made) != len(self._form.scales):
            raise RuntimeError(f"{len(self._form.scales)} scales of the cache have {len(made)} names")
        return made

    def require_all(self) -> None:
        """Raise CS4304 when a tensor did not reach the file in its own form."""
        expected = len(self._form.quantized) + len(self._form.factored) + len(self._form.sparse)
        reached = len(self._quantized) + len(self._ranks) + len(self._sparse)
        if reached != expected:
            raise Refusal(
                "CS4304",
                "A weight cannot be stored in a checkpoint in this form.",
                where=next(iter({**self._form.quantized, **self._form.factored, **self._form.sparse})),
                why=f"transformers stores {expected - reached} of {expected} such weights in another form than it computes "
                "with, and codes cannot be converted.",
                hint="Leave --quantize or --low-rank out, or compile for ort-cpu.",
            )

    def quantization_config(self) -> dict[str, Any] | None:
        """For ``config.json``, after everything was encoded; None for plain weights."""
        form = self._form
        if form.quantized or form.scales:
            cache = CACHE_SCHEME if form.scales else None
            return quantization_config(form.scheme, self._others(self._quantized), cache)
        if self._ranks:
            return {"quant_method": LOW_RANK_METHOD, "ranks": dict(self._ranks)}
        if self._sparse:
            # The sparse kernel was never run on a GPU: the file is what is gained.
            return {"quant_method": SPARSE_METHOD, "ignore": self._others(self._sparse), "kernel": "dense"}
        return None

    def _others(self, names: list[str]) -> list[str]:
        """Linear layers of the class that are not among ``names``, by module name."""
        architecture = architecture_of(self._form.view.config)
        model = architecture.on_meta(architecture.parsed(architecture.config))
        own = {name.removesuffix(WEIGHT) for name in names}
        # After removing layers the last numbers of the source model are free: no module has those names.
        blocks = {".".join(name.split(".")[:3]) for name in own}
        linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        return [name for name in linears if name not in own and (name.count(".") < 3 or _block(name) in blocks)]


def _block(name: str) -> str:
    return ".".join(name.split(".")[:3])
