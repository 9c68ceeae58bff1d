"""The forms of a GEMM: each computes it, on the CPU where torch has it there, and says where it cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compile_sparse.compiler.microbench.gemm_forms import Cast, Integer, Prepared, Sparse, forms_for, two_of_four
from compile_sparse.compiler.microbench.numerics import relative_error
from compile_sparse.compiler.microbench.shapes import ProductShape
from tests.unit.microbench.fake_device import CpuDevice

SHAPE = ProductShape(rows=37, inner=128, outer=96, regime="prompt", layers=1, example="w")
DENSE = [Cast("fp16"), Cast("bf16"), Integer(), Cast("fp8")]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def cusparselt(monkeypatch):
    """cuSPARSELt's three functions, computed densely; the packed weight is the weight."""
    calls = []

    def compress(weight):
        """The real one drops what is not 2:4 without a word."""
        groups = weight.to(torch.float32).reshape(-1, 4)
        assert ((groups != 0).sum(1) <= 2).all()
        return weight

    def multiply(packed, right, *, out_dtype, alg_id):
        calls.append((tuple(packed.shape), tuple(right.shape), out_dtype, alg_id))
        return (packed.to(torch.float64) @ right.to(torch.float64)).to(out_dtype)

    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda packed, right, *, out_dtype: 7)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    return calls


@pytest.mark.parametrize("form", DENSE, ids=lambda form: form.name)
def test_dense_forms_compute_the_product(form):
    device = CpuDevice()
    assert form.unavailable(device) == form.misfit(SHAPE) == ""
    prepared = form.prepare(SHAPE, device)
    assert len(prepared.calls) == 2
    assert relative_error(prepared) <= form.bound
    # The bound tells a GEMM from one that leaves a single step of the contraction out.
    short = replace(prepared, left=torch.cat([prepared.left[:, 1:], prepared.left[:, :1]], 1))
    assert not relative_error(short) <= form.bound


@pytest.mark.parametrize("format", ["fp16", "int8", "fp8"])
def test_sparse_forms_ask_for_what_the_dense_one_writes(cusparselt, format):
    form = Sparse(format)
    assert form.unavailable(CpuDevice()) == ""
    prepared = form.prepare(SHAPE, CpuDevice())
    assert relative_error(prepared) <= form.bound
    packed, right, output, algorithm = cusparselt[-1]
    rows = 40 if format == "fp16" else 48  # 37, up to a multiple of 8 or 16
    assert (packed, right, algorithm) == ((96, 128), (128, rows), 7)
    assert output == {"fp16": torch.float16, "int8": torch.int32, "fp8": torch.bfloat16}[format]
    assert str(rows) in prepared.note and "37" in prepared.note


def test_a_sparse_kernel_that_skips_more_than_zeros_is_found(cusparselt, monkeypatch):
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: torch.where(torch.arange(128) % 16 == 0, 0, weight))
    for format in ("fp16", "int8"):
        form = Sparse(format)
        assert relative_error(form.prepare(SHAPE, CpuDevice())) > form.bound


def test_an_old_torch_without_a_search_uses_the_first_algorithm(cusparselt, monkeypatch):
    def absent(*args, **kwargs):
        raise AttributeError("_cslt_sparse_mm_search")

    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", absent)
    prepared = Sparse("fp16").prepare(SHAPE, CpuDevice())
    prepared.calls[0]()
    assert cusparselt[-1][-1] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, torch.float8_e4m3fn])
def test_two_of_every_four_are_left(dtype):
    weight = torch.ones(64, 256).to(dtype)
    kept = two_of_four(weight).to(torch.float32).reshape(-1, 4) != 0
    assert two_of_four(weight).dtype == dtype
    assert torch.equal(kept.sum(1), torch.full((64 * 64,), 2))
    assert len(torch.unique(kept, dim=0)) == 6, "every choice of two appears"


def test_few_rows_are_filled_up_and_said():
    few = replace(SHAPE, rows=1)
    prepared = Integer().prepare(few, CpuDevice())
    assert prepared.left.shape == (32, 128)
    assert prepared.note == "32 rows in place of 1, which its kernels need"
    assert Cast("fp16").prepare(few, CpuDevice()).note == ""


def test_what_an_architecture_lacks_is_said(cusparselt):
    def reasons(capability):
        device = CpuDevice(capability=capability)
        return {form.name: form.unavailable(device) for form in forms_for("fp16")}

    assert not any(reasons((9, 0)).values())
    ampere = reasons((8, 6))
    assert {name for name, why in ampere.items() if why} == {"fp8", "fp8 2:4"}
    assert "8.9 is the first" in ampere["fp8"]
    assert "sparse tensor cores" in reasons((7, 5))["fp16 2:4"]


def test_a_torch_without_the_library_is_said():
    if torch.backends.cusparselt.is_available():
        pytest.skip("this torch has cuSPARSELt")
    assert Sparse("fp16").unavailable(CpuDevice()) == "This torch is built without cuSPARSELt."


@pytest.mark.parametrize(
    ("form", "inner", "outer", "named"),
    [
        (Cast("fp16"), 7, 9, ()),
        (Integer(), 12, 16, ("K = 12 of 8",)),
        (Cast("fp8"), 24, 40, ("K = 24 of 16", "N = 40 of 16")),
        (Sparse("fp16"), 64, 24, ("N = 24 of 16",)),
        (Sparse("int8"), 48, 64, ("K = 48 of 32",)),
    ],
)
def test_sizes_that_kernels_do_not_take_are_named(form, inner, outer, named):
    why = form.misfit(replace(SHAPE, inner=inner, outer=outer))
    assert bool(why) == bool(named)
    assert all(part in why for part in named)


def test_forms_follow_the_precision():
    assert [form.name for form in forms_for("bf16")] == ["bf16", "int8", "fp8", "bf16 2:4", "int8 2:4", "fp8 2:4"]
    assert forms_for("fp16")[0].name == "fp16"


def test_results_that_are_no_product_are_infinitely_wrong():
    left, right = torch.randn(8, 16), torch.randn(12, 16)
    good = left @ right.T
    wrong = good.clone()
    wrong[3, 4] = float("nan")
    for result in (good.T.contiguous(), good[:, :-1], wrong):
        assert relative_error(Prepared((lambda r=result: r,), left, right)) == float("inf")
    # One of several weights is wrong.
    assert relative_error(Prepared((lambda: good, lambda: 2 * good), left, right)) == pytest.approx(1)
