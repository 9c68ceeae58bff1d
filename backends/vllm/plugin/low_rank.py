"""Quantization method ``compile_sparse_low_rank``: linears stored as a product of two thin matrices. Experimental.

``y = B (A x) + bias``, with ``weight_a: [r, in]`` and ``weight_b: [out, r]`` in place of ``weight: [out, in]``.

``quantization_config``: ``quant_method``, and ``ranks``: full name of the linear in the checkpoint -> ``r``, as in
``{"model.layers.0.mlp.down_proj": 128}``. Linears that are not listed are stored as usual. vLLM fuses q, k, v and gate, up; the
parts of such a module have ranks of their own, and some may be dense: with ``A_q``, ``W_k``, ``A_v`` on top of each other, one
product of ``x`` gives all inputs of the second step, and the dense parts are done. Tensor parallel size 1 only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

__all__ = ["LowRankConfig"]

_NAME = "compile_sparse_low_rank"
_KEYS = {"quant_method", "ranks"}
_SHARDS = {"q": 0, "k": 1, "v": 2}
"""vLLM numbers the parts of a fused module, except these three."""


class LowRankConfig(QuantizationConfig):
    """``quantization_config`` of a checkpoint.

    Raises:
        ValueError: unknown key, or a rank that is not a positive number.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        if unknown := sorted(set(config) - _KEYS):
            raise ValueError(f"{_NAME}: unknown keys {unknown} in quantization_config, known are {sorted(_KEYS)}.")
        self.ranks: dict[str, int] = dict(config.get("ranks") or {})
        for name, rank in self.ranks.items():
            if type(rank) is not int or rank < 1:
                raise ValueError(f"{_NAME}: the rank of {name} is a positive number, got {rank!r}.")

    def get_name(self) -> str:
        return _NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LowRankConfig:
        return cls(config)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        if not isinstance(layer, LinearBase):
            return None
        parent, _, leaf = prefix.rpartition(".")
        leaves = self.packed_modules_mapping.get(leaf, [leaf])
        names = [f"{parent}.{part}" if parent else part for part in leaves]
        ranks = [self.ranks.get(name) for name in names]
        dense = UnquantizedLinearMethod()
        return dense if not any(ranks) else _LowRankMethod(prefix, names, ranks, dense)


@dataclass(frozen=True)
class _Part:
    """One linear of the checkpoint inside a module of vLLM.

    Attributes:
        name: in the checkpoint.
        out: output features.
        rank: None for a dense part.
    """

    name: str
    out: int
    rank: int | None

    @property
    def rows(self) -> int:
        """Of the first matrix."""
        return self.rank or self.out


class _LowRankMethod(QuantizeMethodBase):
    """One linear, fused or not, with at least one part of low rank."""

    def __init__(self, prefix: str, names: list[str], ranks: list[int | None], dense: QuantizeMethodBase) -> None:
        self.prefix, self.names, self.ranks, self.dense = prefix, names, ranks, dense
        self.parts: list[_Part] = []

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
        if (input_size_per_partition, sum(output_partition_sizes)) != (input_size, output_size):
            raise ValueError(f"{self.prefix}: {_NAME} runs at tensor parallel size 1 only.")
        if len(output_partition_sizes) != len(self.names):
            raise ValueError(
                f"{self.prefix}: vLLM fuses {len(output_partition_sizes)} linears here, {_NAME} knows {self.names}."
            )
        self.parts = [_Part(*part) for part in zip(self.names, output_partition_sizes, self.ranks, strict=True)]
        for part in self.parts:
            if part.rank and part.rank > min(part.out, input_size):
                raise ValueError(f"{part.name}: rank {part.rank} of a [{part.out}, {input_size}] linear.")
        shapes: dict[str, list[tuple[int, int] | None]] = {
            "weight_a": [(part.rank, input_size) if part.rank else None for part in self.parts],
            "weight_b": [(part.out, part.rank) if part.rank else None for part in self.parts],
            "weight": [None if part.rank else (part.out, input_size) for part in self.parts],
        }
        for name, blocks in shapes.items():
            if any(blocks):
                layer.register_parameter(name, self._blocks(name, blocks, params_dtype))

    def _blocks(self, name: str, shapes: list[tuple[int, int] | None], dtype: torch.dtype) -> nn.Parameter:
        """The matrices of all parts in one flat parameter, which knows how to load one of them.

        It starts as NaN, by which a matrix that the checkpoint lacks is found: vLLM counts names after fusing, and would not
        miss it.
        """
        size = sum(shape[0] * shape[1] for shape in shapes if shape)
        flat: Any = nn.Parameter(torch.full((size,), float("nan"), dtype=dtype), requires_grad=False)
        flat.shapes = shapes
        flat.weight_loader = self._loader(name)
        return flat

    def _loader(self, name: str) -> Callable[..., None]:
        def load(flat: Any, loaded: torch.Tensor, shard: str | int | None = None) -> None:
            number = _SHARDS[shard] if isinstance(shard, str) else shard or 0
            block, part = _views(flat)[number], self.parts[number]
            if block is None:
                kind = f"listed under 'ranks' with {part.rank}" if part.rank else "not listed under 'ranks'"
                raise ValueError(f"{part.name}.{name} is in the checkpoint, but the linear is {kind}.")
            if block.shape != loaded.shape:
                raise ValueError(
                    f"{part.name}.{name} is {list(loaded.shape)} in the checkpoint; "
                    f"the config and its rank say {list(block.shape)}."
                )
            block.copy_(loaded)

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        blocks = {name: _views(flat) for name, flat in layer.named_parameters(recurse=False) if hasattr(flat, "shapes")}
        for name, views in blocks.items():
            for part, view in zip(self.parts, views, strict=True):
                if view is not None and view.isnan().any():
                    raise ValueError(f"{part.name}.{name} is missing from the checkpoint or holds NaN.")
        first = [blocks["weight_a" if part.rank else "weight"][number] for number, part in enumerate(self.parts)]
        layer.low_rank_first = self._prepared(torch.cat(first))
        layer.low_rank_second = nn.ModuleList(
            nn.Identity() if view is None else self._prepared(view.clone()) for view in blocks["weight_b"]
        )
        for name in blocks:
            delattr(layer, name)

    def _prepared(self, weight: torch.Tensor) -> nn.Module:
        """A module that vLLM's unquantized method can apply: on a CPU it packs the weight first."""
        holder = nn.Module()
        holder.weight = nn.Parameter(weight, requires_grad=False)
        self.dense.process_weights_after_loading(holder)
        return holder

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        inner = self.dense.apply(layer.low_rank_first, x).split([part.rows for part in self.parts], dim=-1)
        outputs = [
            self.dense.apply(second, piece.contiguous()) if part.rank else piece
            for part, second, piece in zip(self.parts, layer.low_rank_second, inner, strict=True)
        ]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return y if bias is None else y + bias


def _views(flat: Any) -> list[Any]:
    """The matrix of each part inside a flat parameter, None for parts without one."""
    views: list[Any] = []
    start = 0
    for shape in flat.shapes:
        if shape is None:
            views.append(None)
            continue
        views.append(flat.data[start : start + shape[0] * shape[1]].view(shape))
        start += shape[0] * shape[1]
    return views
