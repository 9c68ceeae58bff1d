"""The compressed-tensors checkpoint format: which tensors stand for a quantized weight, and the config that describes them.

Written with torch alone; the layouts are those of compressed-tensors 0.17 as vLLM 0.32 and transformers 5.19 read them. Names
in ``config.json`` are case-sensitive, absent keys mean their defaults, and there is no ``sparsity_config``: vLLM refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from compile_sparse.compiler.ir.quantization_schemes import Scheme, WeightFormat
from compile_sparse.compiler.ir.quantized_tensor import QuantizedTensor
from compile_sparse.compiler.ir.weights import DerivedTensor, TensorSource

__all__ = ["WEIGHT", "encoded", "pack_codes", "quantization_config"]

WEIGHT = ".weight"
_INT32_BITS = 32


def quantization_config(
    scheme: Scheme | None, ignore: Sequence[str], kv_cache: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """``quantization_config`` of a model whose linear layers all follow ``scheme``, except those in ``ignore``.

    Args:
        scheme: None when only the cache is quantized.
        ignore: linear layers that are not quantized, by module name.
        kv_cache: of a quantized key-value cache.
    """
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": _format(scheme) if scheme else "dense",
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": {},
    }
    if scheme is not None:
        config["config_groups"]["group_0"] = {
            "targets": ["Linear"],
            "weights": _weights(scheme.weights),
            "input_activations": _activations(scheme),
            "output_activations": None,
            "format": _format(scheme),
        }
    return {**config, "kv_cache_scheme": dict(kv_cache)} if kv_cache else config


def _format(scheme: Scheme) -> str:
    if scheme.weights.kind == "fp4":
        return "nvfp4-pack-quantized"
    if scheme.weights.kind == "fp8":
        return "float-quantized"
    return "int-quantized" if scheme.activations else "pack-quantized"


def _weights(fmt: WeightFormat) -> dict[str, Any]:
    strategy = "block" if fmt.block else "group" if fmt.group else "channel"
    described: dict[str, Any] = {
        "num_bits": fmt.bits,
        "type": "int" if fmt.kind == "int" else "float",
        "strategy": "tensor_group" if fmt.kind == "fp4" else strategy,
        "group_size": fmt.group or None,
        "symmetric": fmt.symmetric,
        "dynamic": False,
    }
    return {**described, "block_structure": [fmt.block, fmt.block]} if fmt.block else described


def _activations(scheme: Scheme) -> dict[str, Any] | None:
    if not scheme.activations:
        return None
    kind, _, granularity = scheme.activations.partition("-")
    described: dict[str, Any] = {
        "num_bits": 4 if kind == "fp4" else 8,
        "type": "int" if kind == "int8" else "float",
        "symmetric": True,
    }
    if kind == "fp4":
        return {
            **described,
            "strategy": "tensor_group",
            "group_size": 16,
            "dynamic": "local",
            # Without it transformers keeps the scales it finds at run time in float32; GPUs round them to e4m3.
            "scale_dtype": "torch.float8_e4m3fn",
        }
    if granularity == "group":
        return {**described, "strategy": "group", "group_size": 128, "dynamic": True}
    return {**described, "strategy": "tensor" if granularity else "token", "dynamic": not granularity}


def encoded(name: str, tensor: QuantizedTensor, stored: torch.dtype) -> dict[str, TensorSource]:
    """The tensors that stand for ``name`` (``....weight``, ``[out, in]``) in a checkpoint.

    Args:
        name: of the weight.
        tensor: it, quantized.
        stored: type of the scales of weight-only formats; they are representable in it.
    """
    stem, parts, fmt = name.removesuffix(WEIGHT), tensor.parts, tensor.scheme.weights
    rows, columns = tensor.shape
    codes, scale = parts["codes"], parts["scale"]
    if fmt.kind == "fp4":
        return {
            f"{stem}.weight_packed": DerivedTensor(
                (rows, columns // 2), torch.uint8, lambda: _pack_nibbles(codes.load())
            ),
            f"{stem}.weight_scale": scale,
            f"{stem}.weight_global_scale": parts["global_scale"],
            f"{stem}.input_global_scale": parts["input_scale"],
        }
    if tensor.scheme.activations:
        wide = scale if len(scale.shape) == 2 else _reshaped(scale, (rows, 1))
        found = {name: codes, f"{stem}.weight_scale": wide}
        return {**found, f"{stem}.input_scale": parts["input_scale"]} if "input_scale" in parts else found
    per_int = _INT32_BITS // fmt.bits
    offset = 2 ** (fmt.bits - 1) if fmt.symmetric else 0
    groups = 1 if len(scale.shape) == 1 else scale.shape[1]
    found = {
        f"{stem}.weight_packed": DerivedTensor(
            (rows, columns // per_int), torch.int32, lambda: pack_codes(codes.load() + offset, fmt.bits, 1)
        ),
        f"{stem}.weight_scale": _reshaped(scale, (rows, groups), stored),
        f"{stem}.weight_shape": DerivedTensor((2,), torch.int64, lambda: torch.tensor([rows, columns])),
    }
    if not fmt.symmetric:
        zero = parts["zero_point"]
        found[f"{stem}.weight_zero_point"] = DerivedTensor(
            (rows // per_int, groups), torch.int32, lambda: pack_codes(zero.load().view(rows, groups), fmt.bits, 0)
        )
    return found


def pack_codes(codes: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Unsigned codes of ``bits`` bits as int32 along ``dim``, the first code in the lowest bits.

    Args:
        codes: any integer type, values in ``[0, 2^bits - 1]``; the size of ``dim`` is a multiple of ``32 / bits``.
        bits: 4 or 8.
        dim: dimension that becomes ``32 / bits`` times shorter.
    """
    per_int = _INT32_BITS // bits
    runs = codes.movedim(dim, -1).to(torch.int64).bitwise_and(2**bits - 1).unflatten(-1, (-1, per_int))
    packed = (runs << (torch.arange(per_int) * bits)).sum(-1)
    # The sum is below 2^32; int32 keeps its bits as two's complement.
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32).movedim(-1, dim).contiguous()


def _pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    pairs = codes.to(torch.uint8).unflatten(1, (-1, 2))
    return (pairs[..., 0] | (pairs[..., 1] << 4)).contiguous()


def _reshaped(source: TensorSource, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> TensorSource:
    wanted = dtype or source.dtype
    return DerivedTensor(shape, wanted, lambda: source.load().reshape(shape).to(wanted))
