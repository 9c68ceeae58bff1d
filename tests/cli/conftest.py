"""The public API as the command line sees it: the same signatures, nothing behind them."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.shell import shell

REPORT = {
    "schema_version": 1,
    "target": "null",
    "verdict": "faster",
    "verdict_why": "Measured 1.30x.",
    "model": {
        "parameters": {"baseline": 1000, "compiled": 800},
        "artifact_bytes": {"baseline": 4000, "compiled": 3200},
    },
    "passes": [
        {
            "name": "prune-channels",
            "requested": {"fraction": 0.25},
            "achieved": {"fraction": 0.24},
            "skips": [{"where": "layer [0]", "code": "CS2104", "why": "It is [frozen].", "hint": ""}],
        }
    ],
    "fidelity": {"tokens": 10, "top1_agreement": 0.999},
    "performance": {
        "workload": {"batch": 1, "prompt_tokens": 8, "output_tokens": 8, "rounds": 3},
        "baseline": {"prefill_tok_s": 100.0, "decode_tok_s": 10.0, "ttft_ms": {"p50": 5.0}},
        "compiled": {"prefill_tok_s": 130.0, "decode_tok_s": 13.0, "ttft_ms": {"p50": 4.0}},
        "ratio": {
            "prefill_tok_s": {"value": 1.3, "ci95": [1.2, 1.4]},
            "decode_tok_s": {"value": 1.3, "ci95": [1.2, 1.4]},
        },
    },
    "quality": {
        "slices": {"en": {"ppl_baseline": 10.0, "ppl_compiled": 10.5, "ratio": 1.05, "ci95": [1.0, 1.1]}},
        "worst_slice": "en",
    },
    "gates": [{"gate": "ppl[en]<=1.1x", "value": 1.05, "bound": 1.05, "passed": True, "why": "Measured 1.05x."}],
}
PLAN = {
    "schema_version": 1,
    "target": "null",
    "model": {"kind": "decoder", "parameters": 1000, "layers": 2},
    "passes": REPORT["passes"],
    "groups": [{"kind": "channels", "count": 2, "size": 64, "frozen": False}],
    "bytes": {"baseline": 4000, "compiled": 3000},
    "parameters": {"baseline": 1000, "compiled": 750},
    "refusals": [],
}


@dataclass
class FakeResult:
    verdict: str
    report: dict
    artifact: Path
    report_path: Path


class FakeApi(types.ModuleType):
    """Records calls; ``raises`` makes the next call fail."""

    def __init__(self):
        super().__init__("compile_sparse.api")
        self.calls: list[tuple[str, tuple, dict]] = []
        self.raises: BaseException | None = None
        self.plan = PLAN
        self.result = FakeResult("faster", REPORT, Path("out"), Path("out/report.json"))

    def _call(self, name, args, kwargs, answer):
        self.calls.append((name, args, kwargs))
        if self.raises is not None:
            raise self.raises
        return answer

    def compile(self, model, *, target, **kwargs):
        return self._call("compile", (model,), {"target": target, **kwargs}, self.result)

    def explain(self, model, *, target, **kwargs):
        return self._call("explain", (model,), {"target": target, **kwargs}, self.plan)

    def verify(self, artifact, **kwargs):
        return self._call("verify", (artifact,), kwargs, self.result)

    def doctor(self):
        probe = {"target": "null", "available": False, "runtime": "null", "why_not": "No runtime.", "hint": "Other."}
        return self._call("doctor", (), {}, [probe])


@pytest.fixture
def api(monkeypatch):
    import compile_sparse

    fake = FakeApi()
    monkeypatch.setitem(sys.modules, "compile_sparse.api", fake)
    monkeypatch.setattr(compile_sparse, "api", fake, raising=False)
    return fake


@pytest.fixture(name="shell")
def plain_shell():
    """Run a command line: exit code, stdout, stderr."""
    return partial(shell, json=False)
