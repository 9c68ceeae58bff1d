"""From recorded tables to a target file's entry."""

from __future__ import annotations

import pytest

from compile_sparse.compiler.microbench.suggestion import suggest
from compile_sparse.compiler.targets.target import SparsePattern, find_target

NOW = find_target("trt-h100").pattern("2:4")


def row(outer, inner, value, *, format="fp16", width=0.01, rows=16, pattern="2:4"):
    twin = {"value": value, "ci95": [value - width, value + width]}
    return {"outer": outer, "inner": inner, "rows": rows, "format": format, "pattern": pattern, "over_twin": twin}


def table(gains, **changes):
    return [row(outer, inner, value, **changes) for (outer, inner), value in gains.items()]


def test_the_smallest_sizes_from_which_all_pay():
    gains = {(512, 512): 0.8, (512, 4096): 0.95, (4096, 512): 1.01, (4096, 4096): 1.3, (14336, 4096): 1.5}
    found = suggest(table(gains), NOW, "GPU, today")
    assert (found["pays"], found["min_out_features"], found["min_in_features"]) == (True, 4096, 4096)
    assert found["formats"] == ["fp16"]
    assert found["measured"] == (
        "fp16 2:4 0.80x to 1.50x of dense fp16 on 5 sizes; GEMMs alone, through torch, not TensorRT; GPU, today"
    )


def test_what_is_already_known_of_kernels_stays():
    found = suggest(table({(4096, 4096): 1.3}), NOW, "")
    assert (found["in_features_multiple"], found["out_features_multiple"], found["int8_outputs"]) == (32, 8, True)


@pytest.mark.parametrize("value", [1.029, 0.7])
def test_a_gain_below_the_bound_does_not_pay(value):
    found = suggest(table({(4096, 4096): value}), NOW, "")
    assert (found["pays"], found.get("formats")) == (False, None)
    assert found["instead"]


def test_a_gain_that_may_be_noise_does_not_pay():
    assert suggest(table({(4096, 4096): 1.2}, width=0.19), NOW, "")["pays"]
    assert not suggest(table({(4096, 4096): 1.2}, width=0.21), NOW, "")["pays"]


def test_a_size_that_loses_while_decoding_does_not_pay():
    prompt = row(4096, 4096, 1.4, rows=2048)
    assert suggest([prompt, row(4096, 4096, 0.999, rows=1)], NOW, "")["pays"], "no loss that can be told from noise"
    assert not suggest([prompt, row(4096, 4096, 0.9, rows=1)], NOW, "")["pays"]


def test_a_large_size_that_loses_leaves_no_region_below_it():
    gains = {(1024, 1024): 1.2, (2048, 2048): 1.2, (8192, 8192): 0.9}
    assert not suggest(table(gains), NOW, "")["pays"]
    # Beside it, one dimension alone cannot exclude it either.
    gains = {(8192, 1024): 1.2, (1024, 8192): 0.9}
    found = suggest(table(gains), NOW, "")
    assert (found["min_out_features"], found["min_in_features"]) == (8192, 1024)


def test_formats_share_one_pair_where_all_of_them_pay():
    rows = table({(1024, 1024): 1.2, (4096, 4096): 1.4}, format="int8") + table({(1024, 1024): 0.9, (4096, 4096): 1.2})
    found = suggest(rows, NOW, "")
    assert (found["formats"], found["min_out_features"], found["min_in_features"]) == (["fp16", "int8"], 4096, 4096)


def test_forms_that_were_not_measured_say_nothing():
    """Not even that it does not pay."""
    rows = [dict(row(4096, 4096, 1.4), over_twin=None), row(4096, 4096, 1.9, pattern="")]
    assert suggest(rows, NOW, "") is None


@pytest.mark.parametrize("gains", [{(4096, 4096): 1.4}, {(4096, 4096): 0.4}])
@pytest.mark.parametrize("before", [NOW, None])
def test_it_is_an_entry_that_target_files_accept(gains, before):
    entry = SparsePattern.model_validate(suggest(table(gains), before, "GPU"))
    assert entry.why
    assert entry.pays or (entry.measured and entry.instead)
