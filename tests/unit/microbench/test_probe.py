"""The probe on a CPU that says it is a GPU: rows, reasons, refusals, files."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass

import pytest
import torch
import transformers as hf
import yaml
from rich.console import Console

from compile_sparse.compiler.cli.main import run
from compile_sparse.compiler.errors import EnvironmentFailure, UsageError
from compile_sparse.compiler.microbench import probe as probe_module
from compile_sparse.compiler.microbench.device import CudaDevice, mismatch
from compile_sparse.compiler.microbench.gemm_forms import Cast, Integer, Prepared, Sparse
from compile_sparse.compiler.microbench.probe import device_for, measure_shape
from compile_sparse.compiler.microbench.shapes import ProductShape
from compile_sparse.compiler.microbench.suggestion import suggest
from compile_sparse.compiler.microbench.table import probe_table, suggestion_yaml
from compile_sparse.compiler.targets.target import SparsePattern, find_target
from tests.unit.microbench.fake_device import CpuDevice, ScriptedRunner

SHAPE = ProductShape(rows=8, inner=64, outer=64, regime="decode", layers=3, example="w")


@dataclass(frozen=True)
class Made:
    """A form that multiplies by ``factor`` as well, or raises."""

    name: str
    format: str = "fp16"
    pattern: str = ""
    factor: float = 1.0
    bound: float = 0.01
    raises: Exception | None = None

    def unavailable(self, device):
        return ""

    def misfit(self, shape):
        return ""

    def prepare(self, shape, device):
        if self.raises:
            raise self.raises
        left, right = torch.randn(shape.rows, shape.inner), torch.randn(shape.outer, shape.inner)
        return Prepared((lambda: self.factor * (left @ right.T),), left, right)


class ScriptedDevice(CpuDevice):
    """Times by order of preparation: one cost per form, in seconds."""

    costs: tuple[float, ...] = ()

    def runner(self, calls, *, graph):
        self.asked.append(graph)
        position = (len(self.asked) - 1) % len(self.costs)
        mode = "graph" if graph and self.graphs(position) else "launches"
        return ScriptedRunner(lambda: self.costs[position], mode)


def scripted(*costs, **changes):
    device = ScriptedDevice(**changes)
    device.costs = costs
    return device


@pytest.fixture
def folder(tmp_path):
    config = hf.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=128
    )
    config.architectures = ["LlamaForCausalLM"]
    (tmp_path / "model").mkdir()
    config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_speed_ups_are_over_the_dense_form_and_over_the_twin():
    forms = [Made("fp16"), Made("int8", "int8"), Made("fp16 2:4", pattern="2:4"), Made("int8 2:4", "int8", "2:4")]
    rows = {row["form"]: row for row in measure_shape(SHAPE, forms, scripted(8e-6, 4e-6, 5e-6, 2e-6), rounds=3)}
    assert [rows[form.name]["us"] for form in forms] == pytest.approx([8, 4, 5, 2])
    assert rows["fp16"]["over_dense"] is None
    assert rows["int8"]["over_dense"]["value"] == pytest.approx(2)
    assert rows["int8"]["over_twin"] is None
    assert rows["fp16 2:4"]["over_twin"]["value"] == pytest.approx(1.6)
    assert rows["int8 2:4"]["over_dense"]["value"] == pytest.approx(4)
    assert rows["int8 2:4"]["over_twin"]["value"] == pytest.approx(2)
    assert {row["timing"] for row in rows.values()} == {"graph"}
    assert all(row["layers"] == 3 and row["why_not"] == "" for row in rows.values())


def test_a_kernel_that_computes_something_else_is_not_timed():
    rows = measure_shape(
        SHAPE, [Made("fp16"), Made("fast", factor=1.02), Made("ok", factor=1.001)], scripted(1e-6, 1e-6), rounds=3
    )
    assert "differs from the GEMM by 0.02" in rows[1]["why_not"]
    assert rows[1]["us"] is None
    assert rows[2]["us"] is not None


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: no kernel\nmore"), NotImplementedError(), TypeError("x")])
def test_a_form_that_fails_is_a_row(error):
    rows = measure_shape(SHAPE, [Made("fp16"), Made("bad", raises=error)], scripted(1e-6), rounds=3)
    assert rows[0]["us"] is not None
    assert type(error).__name__ in rows[1]["why_not"]
    assert "\n" not in rows[1]["why_not"]


def test_without_the_dense_form_nothing_is_compared():
    rows = measure_shape(
        SHAPE, [Made("fp16", raises=RuntimeError("memory")), Made("int8", "int8")], scripted(1e-6), rounds=3
    )
    assert "memory" in rows[0]["why_not"]
    assert "nothing to compare" in rows[1]["why_not"]
    assert all(row["us"] is None for row in rows)


def test_a_clock_that_fails_is_a_reason():
    class Broken(ScriptedRunner):
        def seconds(self, runs):
            raise RuntimeError("device lost")

    device = CpuDevice()
    device.runner = lambda calls, *, graph: Broken(lambda: 1.0)  # type: ignore[method-assign]
    rows = measure_shape(SHAPE, [Made("fp16"), Made("int8", "int8")], device, rounds=3)
    assert all("device lost" in row["why_not"] for row in rows)


def test_graphs_and_launches_are_never_compared():
    device = scripted(1e-6, 1e-6, graphs=lambda position: position == 0)
    rows = measure_shape(SHAPE, [Made("fp16"), Made("int8", "int8")], device, rounds=3)
    assert {row["timing"] for row in rows} == {"launches"}
    assert device.asked == [True, True, False, False]


def test_real_products_on_this_processor():
    """Dense, int8 and fp8 as torch computes them here; the sparse form says what is missing."""
    forms = [Cast("bf16"), Integer(), Cast("fp8"), Sparse("bf16")]
    rows = measure_shape(SHAPE, forms, CpuDevice(), rounds=3, least_seconds=1e-4)
    assert all(row["us"] > 0 for row in rows[:3])
    assert rows[1]["error"] == 0.0
    assert rows[1]["note"].startswith("32 rows in place of 8")
    if not torch.backends.cusparselt.is_available():
        assert rows[3]["why_not"] == "This torch is built without cuSPARSELt."


@pytest.mark.parametrize(
    ("target", "name", "capability", "why"),
    [
        ("trt-h100", "NVIDIA H100 80GB HBM3", (9, 0), ""),
        ("trt-h200", "NVIDIA H100 80GB HBM3", (9, 0), "is for the H200"),
        ("trt-a10", "NVIDIA A100-SXM4-80GB", (8, 0), "compute capability 8.0"),
        ("trt-a10", "NVIDIA A10G", (8, 6), "is for the A10"),
        ("trt-b200", "NVIDIA GB200", (10, 0), "is for the B200"),
        ("trt-rtx4090", "NVIDIA GeForce RTX 4090", (8, 9), ""),
        ("trt-orin", "Orin", (8, 7), ""),
    ],
)
def test_a_table_of_another_gpu_is_refused(monkeypatch, target, name, capability, why):
    device = CpuDevice(name=name, capability=capability)
    monkeypatch.setattr(probe_module, "open_cuda", lambda: device)
    goal = find_target(target)
    assert device_for(goal, any_gpu=True) is device
    if not why:
        assert device_for(goal, any_gpu=False) is device
        return
    with pytest.raises(EnvironmentFailure, match="CS5402") as caught:
        device_for(goal, any_gpu=False)
    assert why in caught.value.why
    assert "--any-gpu" in caught.value.hint


def test_a_target_without_a_gpu_has_nothing_to_probe():
    with pytest.raises(UsageError, match="CS1044"):
        device_for(find_target("ort-cpu"), any_gpu=True)


def test_weights_are_taken_in_turn_until_no_cache_holds_them():
    gpu = CudaDevice("GPU", (9, 0), cache_bytes=50 << 20, memory_bytes=80 << 30)
    assert gpu.copies(32 << 20) == 4  # 128 MiB, above twice 50
    assert gpu.copies(1 << 30) == 1
    assert gpu.copies(1) == 64, "no more than is useful"
    assert CudaDevice("GPU", (9, 0), 0, 1).copies(100) == 1
    assert mismatch(find_target("trt-h100"), gpu)


@pytest.mark.parametrize("command", ["microbench", "probe"])
def test_the_command_without_a_gpu(capsys, folder, command):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert run([command, "trt-h100", "--model", str(folder), "--json"]) == 5
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["code"] == "CS5401"
    assert "torch built for CUDA" in err


def test_the_command_with_a_gpu(capsys, folder, monkeypatch):
    monkeypatch.setattr(probe_module, "open_cuda", CpuDevice)
    file = folder.parent / "table.json"
    words = ["probe", "trt-h100", "--model", str(folder), "--workload", "prompt=4,rounds=3", "--out", str(file)]
    assert run([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads(file.read_text(encoding="utf-8")) == printed
    assert (printed["kind"], printed["target"], printed["same_gpu"]) == ("probe", "trt-h100", True)
    assert printed["device"]["name"] == "NVIDIA H100 80GB HBM3"
    assert printed["workload"]["prompt"] == 4
    assert str(folder.parent) not in file.read_text(encoding="utf-8"), "no path of this machine"
    # q k v o; gate up; down; the head: 4 sizes, two numbers of rows, six forms.
    assert len(printed["rows"]) == 4 * 2 * 6
    if not torch.backends.cusparselt.is_available():
        assert printed["suggestion"] is None

    assert run(words) == 2
    assert "--force" in capsys.readouterr().err
    assert run([*words, "--force"]) == 0
    shown = capsys.readouterr().out
    assert "NVIDIA H100" in shown and "over dense" in shown
    assert shown.count("without cuSPARSELt") in (0, 3), "a form that is missing everywhere is said once"
    assert shown.splitlines()[-1] == str(file)


def test_the_table_shows_what_was_found():
    forms = [Made("fp16"), Made("fp16 2:4", pattern="2:4"), Made("fp8", "fp8", raises=RuntimeError("none"))]
    rows = measure_shape(SHAPE, forms, scripted(8e-6, 5e-6), rounds=3)
    suggestion = suggest(rows, find_target("trt-h100").pattern("2:4"), "GPU, today")
    result = {
        "device": CpuDevice().facts(),
        "measured_at": "2026-01-01",
        "target": "trt-h100",
        "same_gpu": True,
        "rows": rows,
        "left_out": [{"where": "conv2d", "why": "2 GEMMs."}],
        "limits": ["A limit."],
        "suggestion": suggestion,
    }
    console = Console(width=160, file=io.StringIO())
    console.print(probe_table(result))
    shown = console.file.getvalue()
    for text in ("1.60x (1.60 to 1.60)", "64 x 64", "8 (decode)", "8.0", "left out: conv2d", "note: A limit."):
        assert text in shown, text
    assert "not measured: fp8: It failed here: RuntimeError: none" in shown
    entry = yaml.safe_load(suggestion_yaml(suggestion))["sparse_patterns"]
    assert SparsePattern.model_validate(entry[0]).min_in_features == 64
    assert entry[0]["min_in_features"] == 64 and suggestion_yaml(suggestion) in "\n".join(
        map(str.rstrip, shown.split("\n"))
    )


def test_another_gpu_is_recorded(capsys, folder, monkeypatch):
    monkeypatch.setattr(probe_module, "open_cuda", CpuDevice)
    words = ["probe", "trt-a100", "--model", str(folder), "--workload", "rounds=3,prompt=2"]
    assert run(words) == 5
    capsys.readouterr()
    assert run([*words, "--any-gpu"]) == 0
    assert "This is not trt-a100's GPU" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["missing/table.json", "."])
def test_a_file_that_cannot_be_written_is_said_before_measuring(capsys, folder, monkeypatch, place):
    monkeypatch.setattr(probe_module, "open_cuda", lambda: pytest.fail("measured first"))
    assert run(["probe", "trt-h100", "--model", str(folder), "--out", str(folder / place)]) == 2
    assert "CS1045" in capsys.readouterr().err


def test_a_bad_workload_is_a_usage_error(capsys, folder):
    for words in (["--workload", "prompt=x"], ["--concurrency", "0"], ["--concurrency", "a,b"]):
        assert run(["probe", "trt-h100", "--model", str(folder), *words]) == 2
        assert "CS1" in capsys.readouterr().err
