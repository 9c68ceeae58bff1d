"""The vLLM targets are consistent with what vLLM 0.32's sources say about compute capabilities."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from compile_sparse.backends.vllm.backend import VllmBackend
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES
from compile_sparse.compiler.runtimes.environments import RuntimeRecord, write_record
from compile_sparse.compiler.targets.target import find_target, load_targets
from compile_sparse.compiler.version_numbers import older

TARGETS = sorted(name for name, target in load_targets().items() if target.backend == "vllm")
GPUS = sorted(name for name in TARGETS if find_target(name).device == "cuda")
CAPABILITIES = {
    "vllm-a100": "8.0",
    "vllm-a10": "8.6",
    "vllm-l4": "8.9",
    "vllm-h100": "9.0",
    "vllm-h200": "9.0",
    "vllm-b200": "10.0",
}
SINCE = {"fp8": "8.9", "fp8-static": "8.9", "fp8-block": "9.0", "nvfp4": "10.0"}
"""First compute capability whose GEMMs take both operands in this format."""


def test_every_gpu_has_its_capability() -> None:
    assert {name: find_target(name).compute_capability for name in GPUS} == CAPABILITIES


@pytest.mark.parametrize("name", TARGETS)
def test_every_scheme_runs_or_is_refused_with_a_reason(name: str) -> None:
    target = find_target(name)
    assert sorted([*target.schemes, *target.refused_schemes]) == sorted(SCHEMES)
    assert all(why.endswith(".") for why in target.refused_schemes.values())
    assert (target.logits, target.baseline_precision) == ("float", "bf16")


@pytest.mark.parametrize("name", TARGETS)
def test_no_zeros_pay(name: str) -> None:
    target = find_target(name)
    for pattern in ("2:4", "1:4", "unstructured", "block"):
        found = target.pattern(pattern)
        assert found is not None
        assert not found.pays


@pytest.mark.parametrize("name", GPUS)
def test_what_was_never_run_says_so(name: str) -> None:
    assert "unverified" in find_target(name).summary


@pytest.mark.parametrize("name", GPUS)
def test_formats_start_and_end_with_the_hardware(name: str) -> None:
    target = find_target(name)
    for scheme, first in SINCE.items():
        assert (scheme in target.schemes) == (not older(target.compute_capability, first)), scheme
    # CUTLASS has int8 GEMMs up to 9.0.
    assert ("w8a8" in target.schemes) == older(target.compute_capability, "10.0")
    alternatives = [
        name for name in target.schemes if f"--quantize {name}" in " ".join(target.refused_schemes.values())
    ]
    assert alternatives, "what is refused comes with something this target has"


@pytest.mark.parametrize("name", GPUS)
def test_the_grid_fits_every_kernel_and_group(name: str) -> None:
    target = find_target(name)
    for scheme in target.schemes:
        weights = SCHEMES[scheme].weights
        assert target.alignment % max(weights.group, weights.block, 1) == 0
    target.require_gpus(4)


def test_a_gpu_measures_for_its_own_target_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILE_SPARSE_RUNTIMES", str(tmp_path / "runtimes"))
    write_record(
        RuntimeRecord(
            name="vllm",
            python=Path(sys.executable),
            managed=False,
            device="cuda",
            versions={"vllm": "0.32.0"},
            facts={"capability": "9.0", "gpu": "NVIDIA H100"},
            checked_at="2026-01-01T00:00:00+00:00",
        )
    )
    available = {name for name in TARGETS if VllmBackend().probe(find_target(name)).available}
    assert available == {"vllm-h100"}
    assert "called 'NVIDIA H100'" in VllmBackend().probe(find_target("vllm-h200")).why_not
    why = VllmBackend().probe(find_target("vllm-a100")).why_not
    assert "NVIDIA H100 has compute capability 9.0, the target 8.0" in why
