"""Quantization method ``compile_sparse_24``: 2:4 weights stored compressed. Experimental.

What it does is make the file smaller. Each linear has ``weight_values: [out, in / 2]`` and ``weight_indices: [out, in / 8]``
(uint8, four 2-bit places to a byte, the first in the lowest bits) and is expanded on load.

* CPU and others: then it is an unquantized linear, of dense memory and speed.
* CUDA of compute capability 8.0 or more, 16-bit dtype: ``torch.sparse.to_sparse_semi_structured``, called through an operator of
  ours that torch.compile and CUDA graphs see as one opaque node. UNVERIFIED: never run on a GPU. ``"kernel": "dense"`` in
  ``quantization_config`` turns it off.

``quantization_config``: ``quant_method``; ``ignore``: full names of linears that are stored dense; ``kernel``: ``sparse`` (the
default) or ``dense``. The parts of a module that vLLM fuses (q, k, v; gate, up) are all ignored or none is.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

__all__ = ["Sparse24Config", "expand"]

_NAME = "compile_sparse_24"
_KEYS = {"quant_method", "ignore", "kernel"}
_SOME_PLACES = 0b01_00_01_00
_ROWS, _COLUMNS = 32, 64
"""Multiples of ``out`` and ``in`` that both of torch's kernels, cuSPARSELt and CUTLASS, take in 16 bits."""

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is logged below its own name


class Sparse24Config(QuantizationConfig):
    """``quantization_config`` of a checkpoint.

    Raises:
        ValueError: unknown key or kernel; a fused module of which only some parts are ignored.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        if unknown := sorted(set(config) - _KEYS):
            raise ValueError(f"{_NAME}: unknown keys {unknown} in quantization_config, known are {sorted(_KEYS)}.")
        self.ignore = list(config.get("ignore") or ())
        self.kernel = config.get("kernel", "sparse")
        if self.kernel not in ("sparse", "dense"):
            raise ValueError(f"{_NAME}: kernel is 'sparse' or 'dense', got {self.kernel!r}.")

    def get_name(self) -> str:
        return _NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70  # what cannot use the sparse kernels runs dense

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Sparse24Config:
        return cls(config)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

        if not isinstance(layer, LinearBase):
            return None
        if is_layer_skipped(prefix, self.ignore, self.packed_modules_mapping):
            return UnquantizedLinearMethod()
        return _Sparse24Method(prefix, self.kernel, UnquantizedLinearMethod())


def expand(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The dense weight ``[out, in]`` of ``values: [out, in / 2]`` and ``indices: [out, in / 8]``.

    Raises:
        ValueError: two values of a group of four have the same place, or are out of order.
    """
    out, half = values.shape
    places = torch.stack([(indices >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).reshape(out, half // 2, 2)
    if not (places[..., 0] < places[..., 1]).all():
        raise ValueError("weight_indices are damaged: the two places of a group of four are not in order.")
    dense = values.new_zeros(out, half // 2, 4)
    return dense.scatter_(2, places.long(), values.reshape(out, half // 2, 2)).reshape(out, 2 * half)


class _Sparse24Method(QuantizeMethodBase):
    """One linear, fused or not."""

    def __init__(self, prefix: str, kernel: str, dense: QuantizeMethodBase) -> None:
        self.prefix, self.kernel, self.dense = prefix, kernel, dense

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        from vllm.model_executor.parameter import ModelWeightParameter

        width, out = input_size_per_partition, sum(output_partition_sizes)
        if width % 8:
            share = "" if width == input_size else f" ({input_size} over the tensor parallel ranks)"
            raise ValueError(
                f"{self.prefix}: 2:4 needs an input size that is a multiple of 8, got {width}{share}. "
                f"Store this linear dense and list it under 'ignore' in quantization_config."
            )
        for name, data in (
            # NaN shows a part of a fused module that the checkpoint lacks: vLLM counts names after fusing, and would not.
            ("weight_values", torch.full((out, width // 2), float("nan"), dtype=params_dtype)),
            ("weight_indices", torch.full((out, width // 8), _SOME_PLACES, dtype=torch.uint8)),
        ):
            loader = extra["weight_loader"]
            layer.register_parameter(
                name, ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
            )

    def process_weights_after_loading(self, layer: Any) -> None:
        if layer.weight_values.isnan().any():
            raise ValueError(
                f"{self.prefix}: weight_values are missing from the checkpoint, in part at least, or hold NaN."
            )
        try:
            weight = expand(layer.weight_values.data, layer.weight_indices.data)
        except ValueError as error:
            raise ValueError(f"{self.prefix}: {error}") from error
        del layer.weight_values, layer.weight_indices
        if self.kernel == "sparse" and weight.is_cuda:
            if (problem := _sparse_problem(weight)) is None:
                self._keep_sparse(layer, weight)
                return
            logger.warning("%s runs dense: %s", self.prefix, problem)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        self.dense.process_weights_after_loading(layer)

    @staticmethod
    def _keep_sparse(layer: Any, weight: torch.Tensor) -> None:
        packed = torch.sparse.to_sparse_semi_structured(weight)
        # Plain tensors, not the subclass: they are what graphs and operators can take.
        layer.register_buffer("weight_packed", packed.packed, persistent=False)
        layer.register_buffer("weight_meta", packed.meta, persistent=False)
        layer.out_features_24 = weight.shape[0]

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if hasattr(layer, "weight_packed"):
            return _linear_24(x, layer.weight_packed, layer.weight_meta, bias, layer.out_features_24)
        return self.dense.apply(layer, x, bias)


def _sparse_problem(weight: torch.Tensor) -> str | None:
    """Why torch's sparse kernels cannot take a weight on a CUDA device, as a sentence; None when they can."""
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"the sparse kernels take float16 and bfloat16, the model runs in {weight.dtype}."
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "the sparse kernels need compute capability 8.0."
    if weight.shape[0] % _ROWS or weight.shape[1] % _COLUMNS:
        return f"the sparse kernels need multiples of [{_ROWS}, {_COLUMNS}], the weight is {list(weight.shape)}."
    return None


@torch.library.custom_op("compile_sparse_vllm::linear_24", mutates_args=())
def _linear_24(
    x: torch.Tensor, packed: torch.Tensor, meta: torch.Tensor | None, bias: torch.Tensor | None, out_features: int
) -> torch.Tensor:
    """``x @ W.T + bias`` with ``W`` in the form of torch's semi-structured tensors. UNVERIFIED on a GPU.

    Args:
        x: ``[..., in]``.
        packed: kept values, for cuSPARSELt with the places behind them.
        meta: places, for CUTLASS; None says that ``packed`` is cuSPARSELt's.
        bias: ``[out]`` or None.
        out_features: ``out``.
    """
    sparse = torch.sparse
    kind: Any = (
        sparse.SparseSemiStructuredTensorCUSPARSELT if meta is None else sparse.SparseSemiStructuredTensorCUTLASS
    )
    shape = torch.Size((out_features, x.shape[-1]))
    weight = kind(shape, packed=packed, meta=meta, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None)
    # The kernels may return a view of a padded or transposed result; an operator's result owns dense memory.
    return F.linear(x, weight, bias).contiguous()


@_linear_24.register_fake
def _(
    x: torch.Tensor, packed: torch.Tensor, meta: torch.Tensor | None, bias: torch.Tensor | None, out_features: int
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)
