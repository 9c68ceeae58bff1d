"""A device without a GPU: GEMMs run on the CPU, and a clock that a test may script."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class CpuRunner:
    """Really runs the calls."""

    calls: Sequence[Callable[[], torch.Tensor]]
    mode: str

    def seconds(self, runs: int) -> float:
        start = time.perf_counter()
        for _ in range(runs):
            for call in self.calls:
                call()
        return (time.perf_counter() - start) / (runs * len(self.calls))


@dataclass
class ScriptedRunner:
    """Takes what it is told."""

    scripted: Callable[[], float]
    mode: str = "graph"

    def seconds(self, runs: int) -> float:
        return self.scripted()


@dataclass
class CpuDevice:
    """Says it is some GPU. ``graphs``: whether calls can be recorded, by position."""

    name: str = "NVIDIA H100 80GB HBM3"
    capability: tuple[int, int] = (9, 0)
    where: str = "cpu"
    weights_in_turn: int = 2
    graphs: Callable[[int], bool] = lambda position: True
    asked: list[bool] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        dotted = ".".join(map(str, self.capability))
        return {"name": self.name, "compute_capability": dotted, "torch": "9.9", "cuda": "99.9", "driver": "999.1"}

    def copies(self, weight_bytes: int) -> int:
        return self.weights_in_turn

    def runner(self, calls: Sequence[Callable[[], torch.Tensor]], *, graph: bool) -> CpuRunner:
        self.asked.append(graph)
        return CpuRunner(calls, "graph" if graph and self.graphs(len(self.asked)) else "launches")

    def release(self) -> None:
        return None
