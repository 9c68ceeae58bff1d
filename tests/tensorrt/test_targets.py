"""The TensorRT targets: formats follow the compute capability, zeros follow the records, peaks follow the datasheets."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from compile_sparse.backends.targets import folder
from compile_sparse.compiler.cli.tables import targets_table
from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.extension.backend_options import RunFacts
from compile_sparse.compiler.ir.quantization_schemes import SCHEMES
from compile_sparse.compiler.pipeline.settling import settle_run
from compile_sparse.compiler.recipes.building import Building
from compile_sparse.compiler.targets.target import Target, find_target
from compile_sparse.compiler.targets.workload import Workload
from compile_sparse.compiler.version_numbers import older

CAPABILITIES = {
    "trt-a100": "8.0",
    "trt-a10": "8.6",
    "trt-orin": "8.7",
    "trt-l4": "8.9",
    "trt-rtx4090": "8.9",
    "trt-h100": "9.0",
    "trt-h200": "9.0",
    "trt-b200": "10.0",
    "trt-rtx5090": "12.0",
}
TARGETS = sorted(CAPABILITIES)
SINCE = {
    "w8a8-static": "8.0",
    "w4a16": "8.0",
    "w4a16-g32": "8.0",
    "fp8-static": "8.9",
    "fp8-tensor": "8.9",
    "nvfp4": "10.0",
}
"""Every scheme that TensorRT can execute, and the first compute capability that has it."""
GEFORCE = ("trt-rtx4090", "trt-rtx5090")


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    return find_target(request.param)


def test_every_gpu_has_its_file_and_capability() -> None:
    files = {path.stem for path in folder().glob("trt-*.yaml")}
    assert {name: find_target(name).compute_capability for name in files} == CAPABILITIES


def test_the_contract_of_the_backend(target: Target) -> None:
    assert (target.backend, target.device) == ("tensorrt", "cuda")
    assert target.logits == "float"
    assert target.fallbacks == {"w8a8-static": ()}
    assert target.baseline_precision == "fp16"
    assert target.precisions == ("fp16", "bf16")
    assert not older(target.minimum_versions["tensorrt"], "11.0")


def test_what_was_never_run_says_so(target: Target) -> None:
    assert "unverified" in target.summary
    assert all(pattern.measured.startswith("not by us") for pattern in target.sparse_patterns)


def test_formats_start_with_the_hardware(target: Target) -> None:
    expected = {scheme for scheme, first in SINCE.items() if not older(target.compute_capability, first)}
    assert set(target.schemes) == expected


def test_every_scheme_runs_or_is_refused_with_a_reason(target: Target) -> None:
    assert not set(target.schemes) & set(target.refused_schemes)
    assert {*target.schemes, *target.refused_schemes} == set(SCHEMES)
    for name, why in target.refused_schemes.items():
        assert why.endswith("."), name
        offered = [scheme for scheme in target.schemes if f"--quantize {scheme} " in why]
        assert offered, f"{name}: what is refused comes with something that this target has"


def test_no_scheme_needs_ranges_found_at_run_time(target: Target) -> None:
    for name in target.schemes:
        scheme = SCHEMES[name]
        assert scheme.weights.symmetric
        assert scheme.static or scheme.activations == ""


def test_kept_widths_fit_every_group_and_sparse_kernel(target: Target) -> None:
    pattern = target.pattern("2:4")
    assert pattern is not None
    groups = [SCHEMES[name].weights.group for name in target.schemes]
    for multiple in (pattern.in_features_multiple, pattern.out_features_multiple, *filter(None, groups)):
        assert target.alignment % multiple == 0


def test_two_of_four_pays_where_a_record_says_so(target: Target) -> None:
    pattern = target.pattern("2:4")
    assert pattern is not None
    assert pattern.pays == older(target.compute_capability, "10.0"), "no record of a choice on Blackwell"
    assert pattern.formats == ("fp16", "int8")
    assert pattern.int8_outputs
    # NVIDIA's bound is C and K > 256: the sizes named are the first multiples above it.
    for least, multiple in (
        (pattern.min_in_features, pattern.in_features_multiple),
        (pattern.min_out_features, pattern.out_features_multiple),
    ):
        assert least % multiple == 0
        assert least - multiple <= 256 < least


def test_no_other_zeros_pay(target: Target) -> None:
    for name in ("1:4", "4:8", "unstructured", "block"):
        pattern = target.pattern(name)
        assert pattern is not None
        assert not pattern.pays


def test_an_alternative_to_zeros_is_one_of_the_target(target: Target) -> None:
    offered = SINCE.keys() - target.schemes.keys()
    for pattern in target.sparse_patterns:
        assert not any(f"--quantize {scheme}" in pattern.instead for scheme in offered)
        assert "--sparsity 2:4" not in pattern.instead or target.pattern("2:4").pays  # type: ignore[union-attr]


def test_peaks_have_the_ratios_of_tensor_cores(target: Target) -> None:
    hardware = target.hardware
    assert hardware is not None
    assert "NVIDIA" in hardware.source
    peaks = hardware.dense_tflops
    assert set(peaks) == {"fp16", "int8"} | {"fp8"} & _formats(target) | {"fp4"} & _formats(target)
    # GeForce halves what accumulates in fp32, which integers and fp4 do not.
    halved = 2 if target.name in GEFORCE else 1
    assert peaks["int8"] / peaks["fp16"] == pytest.approx(2 * halved, rel=0.01)
    if "fp8" in peaks:
        assert peaks["fp8"] / peaks["fp16"] == pytest.approx(2, rel=0.01)
    if "fp4" in peaks:
        assert peaks["fp4"] / peaks["int8"] == pytest.approx(2, rel=0.01)


def test_memory_orders_the_boards() -> None:
    bandwidth = {name: find_target(name).hardware.bandwidth_gb_s for name in TARGETS}  # type: ignore[union-attr]
    order = ("orin", "l4", "a10", "rtx4090", "rtx5090", "a100", "h100", "h200", "b200")
    assert sorted(bandwidth, key=bandwidth.__getitem__) == [f"trt-{name}" for name in order]


def test_the_same_gpu_is_the_same_for_vllm() -> None:
    for name in ("a100", "a10", "l4", "h100", "h200", "b200"):
        ours, theirs = find_target(f"trt-{name}"), find_target(f"vllm-{name}")
        assert (ours.gpu, ours.compute_capability) == (theirs.gpu, theirs.compute_capability)


def test_keys_are_written_once() -> None:
    """YAML keeps the last of two equal keys without a word."""
    for path in folder().glob("*.yaml"):
        lines = [line.split(":")[0] for line in path.read_text(encoding="utf-8").splitlines() if line[:1].isalpha()]
        assert len(lines) == len(set(lines)), path.name
        assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == set(lines)


def test_tables_and_dumps_keep_everything(target: Target, tmp_path: Path) -> None:
    data = target.model_dump(mode="json")
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    assert Target.model_validate(yaml.safe_load((tmp_path / "t.yaml").read_text(encoding="utf-8"))) == target
    table = targets_table([data])
    assert table.row_count == 1  # type: ignore[attr-defined]


def test_another_precision_of_the_target() -> None:
    target, facts = find_target("trt-a100"), RunFacts(Workload())
    assert settle_run(target, Building(precision="bf16"), facts).precision_on(target) == "bf16"
    for same in (Building(precision="fp16"), Building()):
        assert settle_run(target, same, facts) == settle_run(target, Building(), facts), "the same artifact"


@pytest.mark.parametrize(("name", "choices"), [("trt-a100", "fp16 or bf16"), ("ort-cpu", "fp32")])
def test_a_precision_that_it_has_not_is_refused(name: str, choices: str) -> None:
    with pytest.raises(UsageError, match="CS1043") as caught:
        find_target(name).require_precision("fp64")
    assert choices in caught.value.why


def _formats(target: Target) -> set[str]:
    return {"fp8" if name.startswith("fp8") else "fp4" for name in target.schemes if "fp" in name}
