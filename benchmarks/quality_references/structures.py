"""What channels and key-value groups have in common: rows of some linears that one linear contracts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Structure", "kv_groups", "mlp_channels", "narrow_columns", "narrow_rows"]


@dataclass(frozen=True)
class Structure:
    """Removable pieces of a decoder layer.

    Attributes:
        count: pieces.
        producers: linears whose rows make the pieces, each piece an equal run of rows.
        consumer: the linear whose columns read them.
    """

    count: int
    producers: tuple[nn.Linear, ...]
    consumer: nn.Linear

    def rows(self, producer: nn.Linear) -> torch.Tensor:
        """Row indices ``[count, rows per piece]``."""
        return torch.arange(producer.out_features).view(self.count, -1)

    @property
    def columns(self) -> torch.Tensor:
        """Column indices of the consumer, ``[count, columns per piece]``."""
        return torch.arange(self.consumer.in_features).view(self.count, -1)

    def reduce(self, entries: list[torch.Tensor]) -> torch.Tensor:
        """Sum a value per weight entry (producers' matrices, then the consumer's) to one per piece ``[count]``."""
        *made, read = entries
        return sum((e.sum(1).view(self.count, -1).sum(1) for e in made), read.sum(0).view(self.count, -1).sum(1))

    def weights(self) -> list[torch.Tensor]:
        """The producers' weights and the consumer's."""
        return [linear.weight.detach() for linear in (*self.producers, self.consumer)]

    def gradients(self) -> list[torch.Tensor]:
        """Gradients of ``weights()``."""
        return [linear.weight.grad for linear in (*self.producers, self.consumer)]

    def keep(self, kept: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> None:
        """Remove every other piece.

        Args:
            kept: pieces that stay, ascending.
            weight: replaces the consumer's remaining columns ``[N, k]``.
            bias: added to the consumer's output ``[N]``.
        """
        for producer in self.producers:
            narrow_rows(producer, self.rows(producer)[kept].flatten())
        narrow_columns(self.consumer, self.columns[kept].flatten())
        if weight is not None:
            self.consumer.weight = nn.Parameter(weight)
        if bias is not None:
            old = 0 if self.consumer.bias is None else self.consumer.bias.detach()
            self.consumer.bias = nn.Parameter(old + bias)


def mlp_channels(layer: Any) -> Structure:
    """The channels between the up and down projections of a gated MLP."""
    mlp = layer.mlp
    return Structure(mlp.down_proj.in_features, (mlp.gate_proj, mlp.up_proj), mlp.down_proj)


def kv_groups(layer: Any) -> Structure:
    """Key-value heads, each with the query heads that share it."""
    attention = layer.self_attn
    return Structure(
        attention.k_proj.out_features // attention.head_dim,
        (attention.q_proj, attention.k_proj, attention.v_proj),
        attention.o_proj,
    )


def narrow_rows(linear: nn.Linear, kept: torch.Tensor) -> None:
    """Keep some outputs of a linear."""
    linear.weight = nn.Parameter(linear.weight.detach()[kept].clone())
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[kept].clone())
    linear.out_features = len(kept)


def narrow_columns(linear: nn.Linear, kept: torch.Tensor) -> None:
    """Keep some inputs of a linear."""
    linear.weight = nn.Parameter(linear.weight.detach()[:, kept].clone())
    linear.in_features = len(kept)
