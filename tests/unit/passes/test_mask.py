"""Zeros in patterns by magnitude: where they are, what is left alone, and what a target says of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from compile_sparse.compiler.errors import ModelError
from compile_sparse.compiler.ir.program import Program, SparsityMask
from compile_sparse.compiler.ir.verifier import verify_program
from compile_sparse.compiler.ir.weights import AbsentTensor, WeightStore
from compile_sparse.compiler.targets.target import find_target
from compile_sparse.passes.mask import Sparsify
from tests.support.contexts import context, target
from tests.toys import toy_program
from tests.unit.passes.masking import DEPTH, FORMS, ROWS, Form, masked, rows, weight
from tests.unit.passes.running import Linear


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8), ("1:16", 1, 16)])
def test_every_run_along_the_contraction_keeps_its_largest(pattern: str, n: int, m: int, form: Form) -> None:
    program = masked(pattern, form)
    verify_program(program)
    kept = rows(program, form)
    for before, after in zip(weight().numpy().reshape(-1, m), kept.reshape(-1, m), strict=True):
        order = np.argsort(-np.abs(before))
        wanted = before.copy()
        wanted[order[n:]] = 0
        np.testing.assert_array_equal(after, wanted)
    assert program.masks == {"weight": SparsityMask(pattern, form.axis, 1 - n / m)}
    # The other direction does not follow the pattern, so a wrong axis would be noticed.
    assert (np.count_nonzero(kept.T.reshape(-1, m), axis=1) != n).any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fraction", ["0.5", ".25", "0.9"])
def test_a_fraction_removes_that_share_of_smallest(fraction: str, form: Form) -> None:
    kept, before = rows(masked(fraction, form), form), weight().numpy()
    removed = kept == 0
    assert removed.sum() == round(before.size * float(fraction))
    np.testing.assert_array_equal(kept[~removed], before[~removed])
    assert np.abs(before[removed]).max() < np.abs(before[~removed]).min()


@pytest.mark.parametrize("form", FORMS)
def test_whole_blocks_of_smallest_sum_are_removed(form: Form) -> None:
    program = masked("block=4x8:0.25", form)
    value = program.weights.load("weight").numpy()
    before = (weight() if form is Linear else weight().t()).numpy()

    def blocks(matrix: np.ndarray) -> np.ndarray:
        return matrix.reshape(matrix.shape[0] // 4, 4, matrix.shape[1] // 8, 8).transpose(0, 2, 1, 3).reshape(-1, 32)

    sums = np.abs(blocks(before)).sum(1)
    gone = np.argsort(sums)[: len(sums) // 4]
    for index, (old, new) in enumerate(zip(blocks(before), blocks(value), strict=True)):
        np.testing.assert_array_equal(new, np.zeros(32) if index in gone else old)
    assert program.masks["weight"] == SparsityMask("block=4x8:0.25", -1, 0.25)


def test_equal_magnitudes_still_follow_the_pattern() -> None:
    kept = rows(masked("2:4", values=torch.ones(ROWS, DEPTH)), Linear)
    assert (np.count_nonzero(kept.reshape(-1, 4), axis=1) == 2).all()


def test_the_bias_and_the_input_program_are_untouched() -> None:
    program = toy_program(Linear(weight()), [torch.zeros(3, DEPTH)])
    result = Sparsify(pattern="2:4").run(program, context())
    assert result.modified
    assert result.requested == {"pattern": "2:4", "criterion": "magnitude"}
    assert result.achieved == {"tensors": 1, "zeros": ROWS * DEPTH // 2}
    assert result.program.weights["bias"] is program.weights["bias"]
    assert torch.equal(program.weights.load("weight"), weight())
    assert not program.masks


def test_the_logits_and_tied_embeddings_are_left_alone(tiny_llama_program: Program, tiny_gpt2_program: Program) -> None:
    for program, linears in ((tiny_llama_program, 14), (tiny_gpt2_program, 8)):
        result = Sparsify(pattern="2:4").run(program, context())
        verify_program(result.program)
        assert result.achieved["tensors"] == linears
        (skip,) = result.diagnostics
        assert (skip.where, skip.code) == ("lm_head.weight", "CS2204")
        assert result.program.weights["lm_head.weight"] is program.weights["lm_head.weight"]


def test_gpt2_follows_the_pattern_along_its_first_axis(tiny_gpt2_program: Program) -> None:
    result = Sparsify(pattern="2:4").run(tiny_gpt2_program, context()).program
    value = result.weights.load("transformer.h.0.mlp.c_fc.weight")
    assert value.shape == (64, 88)
    assert (value.t().reshape(-1, 4).count_nonzero(1) == 2).all()
    assert result.masks["transformer.h.0.mlp.c_fc.weight"].axis == 0


def test_tensors_the_pattern_does_not_divide_are_explained() -> None:
    for pattern, part in (("2:5", "48 is not a multiple of 5"), ("block=5x5:0.5", "[16, 48] does not divide into 5x5")):
        with pytest.raises(ModelError) as caught:
            masked(pattern)
        assert caught.value.code == "CS2203"
        assert part in caught.value.why


def test_planning_reads_no_weights(tiny_gpt2_program: Program) -> None:
    absent = {name: AbsentTensor(s.shape, s.dtype, name) for name, s in tiny_gpt2_program.weights.items()}
    blind = replace(tiny_gpt2_program, weights=WeightStore(absent))
    planned, real = (Sparsify(pattern="2:4").run(p, context()) for p in (blind, tiny_gpt2_program))
    assert planned.achieved == real.achieved
    assert planned.program.masks == real.program.masks
    assert not planned.program.weights.has_values


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "0.5", "block=16x16:0.5"])
def test_onnx_runtime_gains_nothing_and_the_reason_has_figures(pattern: str) -> None:
    (skip,) = Sparsify(pattern=pattern).useless_on(find_target("ort-cpu"))
    assert skip.code == "CS4103"
    assert pattern in skip.where
    assert "Measured:" in skip.why
    assert "prefill" in skip.why
    assert "--prune channels" in skip.hint


def test_a_target_that_declares_nothing_gains_nothing() -> None:
    (skip,) = Sparsify(pattern="2:4").useless_on(target())
    assert skip.code == "CS4103"
    assert "declares no kernel" in skip.why


def test_a_target_whose_kernels_skip_the_zeros_is_content() -> None:
    pays = {"pattern": "2:4", "pays": True, "why": "Sparse tensor cores."}
    paying = type(target()).model_validate({**target().model_dump(), "sparse_patterns": [pays]})
    assert not Sparsify(pattern="2:4").useless_on(paying)
    assert Sparsify(pattern="1:4").useless_on(paying)


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "",
            "4:2",
            "4:4",
            "0:4",
            "2:4:8",
            "2/4",
            "-2:4",
            "0",
            "0.0",
            "1",
            "1.0",
            "1.5",
            "-0.5",
            "half",
            "nan",
            "0.5%",
        ),
        *("block=16x16", "block=16x16:0.0", "block=16x16:1.5", "block=0x16:0.5", "block=16x00:0.5", "block=16:0.5"),
        *("2:4 ", " 2:4", "2:4\n"),
    ],
)
def test_bad_patterns_are_rejected(pattern: str) -> None:
    with pytest.raises(ValidationError):
        Sparsify(pattern=pattern)


@pytest.mark.parametrize(("pattern", "share"), [("2:4", 0.5), ("1:4", 0.75), ("0.3", 0.3), ("block=4x4:.75", 0.75)])
def test_the_share_of_zeros(pattern: str, share: float) -> None:
    assert Sparsify(pattern=pattern).zero_fraction == pytest.approx(share)
