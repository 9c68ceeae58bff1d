"""Perplexity per slice, paired with the dense model's on the same windows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

__all__ = ["Evaluator", "digest", "equal_windows", "read_stream"]

RESAMPLES = 1_000
Logits = Callable[[torch.Tensor], torch.Tensor]
"""Token ids ``[B, S]`` to logits ``[B, S, V]``."""


def read_stream(file: Path, tokenizer: Any) -> torch.Tensor:
    """All documents of a JSONL file as one stream of ids, each between the beginning and end tokens."""
    with file.open(encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line in lines if line.strip()]
    ids: list[int] = []
    for found in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        ids += [i for i in (tokenizer.bos_token_id, *found, tokenizer.eos_token_id) if i is not None]
    return torch.tensor(ids)


def equal_windows(ids: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """``count`` windows ``[count, length]`` at equal strides over the stream, fewer when they would overlap."""
    last = len(ids) - length
    if last < 0:
        raise SystemExit(f"A file has {len(ids)} tokens, less than one window of {length}.")
    count = min(count, last // length + 1)
    starts = [int(index * last / max(count - 1, 1)) for index in range(count)]
    return torch.stack([ids[start : start + length] for start in starts])


def digest(windows: Mapping[str, torch.Tensor]) -> str:
    """Identity of the tokens: two reports with the same digest scored the same text."""
    total = hashlib.sha256()
    for name in sorted(windows):
        total.update(name.encode())
        total.update(windows[name].numpy().tobytes())
    return total.hexdigest()[:12]


class Evaluator:
    """Scores the dense model once and then any number of others against it.

    Args:
        windows: token ids ``[W, S]`` per slice; positions 1 to S-1 are scored.
        dense: the reference model.
        batch: windows per forward.
    """

    def __init__(self, windows: Mapping[str, torch.Tensor], dense: Logits, batch: int = 8) -> None:
        self._windows, self._batch = windows, batch
        self._nll: dict[str, torch.Tensor] = {}
        # Half precision holds a log-probability to 1e-3, far below the divergences compared here, in half the memory.
        self._reference: dict[str, list[torch.Tensor]] = {}
        for name, ids in windows.items():
            scored = [self._score(dense, part) for part in ids.split(batch)]
            self._nll[name] = torch.cat([nll for nll, _ in scored])
            self._reference[name] = [log.half() for _, log in scored]

    @property
    def dense(self) -> dict[str, float]:
        """Perplexity of the reference model per slice and over all."""
        nll = {**self._nll, "all": torch.cat(list(self._nll.values()))}
        return {name: math.exp(values.mean().item()) for name, values in nll.items()}

    def __call__(self, model: Logits) -> dict[str, dict[str, Any]]:
        """Per slice and over all (every window counts alike): perplexity, its ratio to the dense one with a 95 % interval,
        mean KL divergence from the dense model in nats per token, and how often the likeliest token is the same.

        The interval is a paired bootstrap over windows: noise of the evaluation, not of calibration or training.
        """
        nll, divergence, agreement = {}, {}, {}
        for name, ids in self._windows.items():
            rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
            for part, reference in zip(ids.split(self._batch), self._reference[name], strict=True):
                window_nll, log = self._score(model, part)
                dense = reference.float()
                kl = (dense.exp() * (dense - log)).sum(-1).mean(1)
                rows.append((window_nll, kl.double(), (dense.argmax(-1) == log.argmax(-1)).double().mean(1)))
            nll[name], divergence[name], agreement[name] = (torch.cat(column) for column in zip(*rows, strict=True))
        groups: dict[str, Sequence[str]] = {"all": list(nll), **{name: [name] for name in nll}}
        return {
            group: self._summary(names, *(torch.cat([part[n] for n in names]) for part in (nll, divergence, agreement)))
            for group, names in groups.items()
        }

    def _score(self, model: Logits, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean negative log-likelihood per window ``[B]`` in nats, and log-probabilities ``[B, S-1, V]``."""
        with torch.no_grad():
            log = F.log_softmax(model(ids)[:, :-1].float(), dim=-1)
        return -log.gather(-1, ids[:, 1:, None]).squeeze(-1).double().mean(1), log

    def _summary(
        self, names: Sequence[str], nll: torch.Tensor, divergence: torch.Tensor, agreement: torch.Tensor
    ) -> dict[str, Any]:
        excess = nll - torch.cat([self._nll[name] for name in names])
        generator = torch.Generator().manual_seed(0)
        draws = torch.randint(len(excess), (RESAMPLES, len(excess)), generator=generator)
        low, high = torch.quantile(excess[draws].mean(1), torch.tensor([0.025, 0.975], dtype=excess.dtype)).tolist()
        return {
            "ppl": _exp(nll.mean().item()),
            "ratio": _exp(excess.mean().item()),
            "ci95": [_exp(low), _exp(high)],
            "kl": divergence.mean().item(),
            "top1": agreement.mean().item(),
        }


def _exp(nats: float) -> float:
    """Perplexity; a broken model shows as a huge number instead of an overflow."""
    return math.exp(min(nats, 50.0)) if not math.isnan(nats) else math.inf
