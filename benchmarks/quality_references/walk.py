"""Calibration statistics, one decoder layer at a time, with inputs from whatever the earlier layers have become."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["LayerWalk", "Moments", "accumulate_gradients"]

BATCH = 16


@dataclass
class Moments:
    """Sums over tokens of a linear's inputs ``x [K]``, float64.

    Attributes:
        gram: sum of ``x x^T``, ``[K, K]``.
        total, absolute: sums of ``x`` and of ``|x|``, ``[K]``.
        tokens: how many.
    """

    gram: torch.Tensor
    total: torch.Tensor
    absolute: torch.Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, width: int) -> Moments:
        """Of no tokens."""
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in ((width, width), (width,), (width,))))

    def add(self, x: torch.Tensor) -> None:
        """Count the rows of ``x [..., K]``."""
        rows = x.reshape(-1, x.shape[-1])
        self.gram += (rows.T @ rows).double()
        self.total += rows.sum(0).double()
        self.absolute += rows.abs().sum(0).double()
        self.tokens += len(rows)

    @property
    def norms(self) -> torch.Tensor:
        """Euclidean norm of each input over tokens, ``[K]``."""
        return self.gram.diagonal().sqrt()

    @property
    def variances(self) -> torch.Tensor:
        """Variance of each input over tokens, ``[K]``."""
        return (self.gram.diagonal() / self.tokens - (self.total / self.tokens) ** 2).clamp_min(0)


class LayerWalk:
    """Hidden states of the calibration windows on their way through the model.

    Attributes:
        hidden: one tensor ``[B, S, d]`` per batch, the input of the layer that is next.
    """

    def __init__(self, model: Any, windows: torch.Tensor) -> None:
        body = model.model
        with torch.no_grad():
            self.hidden = [body.embed_tokens(ids) for ids in windows.split(BATCH)]
            self._rotary = body.rotary_emb(self.hidden[0], position_ids=torch.arange(windows.shape[1])[None])

    def output(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The layer on one batch; without a mask its attention is causal."""
        with torch.no_grad():
            return layer(hidden, attention_mask=None, position_embeddings=self._rotary)

    def attend(self, attention: nn.Module, normed: torch.Tensor) -> torch.Tensor:
        """An attention module alone on one batch."""
        with torch.no_grad():
            return attention(normed, attention_mask=None, position_embeddings=self._rotary)[0]

    def observe(self, layer: nn.Module, linears: Iterable[nn.Module]) -> list[Moments]:
        """Moments of the inputs of some linears of the layer; the hidden states stay where they are."""
        found, hooks = [], []
        for linear in linears:
            moments = Moments.empty(int(linear.in_features))
            hooks.append(linear.register_forward_pre_hook(lambda _, inputs, m=moments: m.add(inputs[0])))
            found.append(moments)
        for hidden in self.hidden:
            self.output(layer, hidden)
        for hook in hooks:
            hook.remove()
        return found

    def advance(self, layer: nn.Module) -> None:
        """Move the hidden states through the layer as it is now."""
        self.hidden = [self.output(layer, hidden) for hidden in self.hidden]


def accumulate_gradients(model: Any, windows: torch.Tensor, batch: int = 8) -> None:
    """Leave the gradient of the mean calibration loss in every parameter's ``grad``."""
    model.zero_grad()
    parts = windows.split(batch)
    for ids in parts:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        (loss * len(ids) / len(windows)).backward()
