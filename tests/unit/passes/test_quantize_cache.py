"""``quantize-cache``: scales from calibration, what attention and the cache then hold, and what is refused."""

from __future__ import annotations

import pytest
import torch

from compile_sparse.compiler.errors import ModelError, Refusal, UsageError
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.executor import Executor, decoder_inputs
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.verifier import verify_program
from compile_sparse.passes.quantize_cache import QuantizeCache
from tests.support.contexts import context as any_context

WINDOWS = tuple(tuple((7 * i + 3 * j) % 90 + 3 for j in range(16)) for i in range(4))


def context(*, text: bool = True, formats: tuple[str, ...] = ("fp8",), plan_only: bool = False) -> PassContext:
    changes = {"cache_formats": dict.fromkeys(formats, "somehow")}
    return any_context(CalibrationStream(WINDOWS) if text else None, changes=changes, plan_only=plan_only)


def outputs(program: Program) -> dict[str, torch.Tensor]:
    return Executor(program).run(decoder_inputs(program, torch.tensor(WINDOWS)))


def test_scales_cover_the_text_and_the_cache_holds_e4m3_values(tiny_llama_program: Program) -> None:
    result = QuantizeCache().run(tiny_llama_program, context())
    verify_program(result.program)
    assert result.achieved["tensors"] == 4
    dense, coded = outputs(tiny_llama_program), outputs(result.program)
    for name in ("present.0.key", "present.0.value", "present.1.key", "present.1.value"):
        scale = result.program.weights.load(f"{name}.scale")
        assert scale.shape == (1,)
        codes = coded[name] / scale
        # Every cached value is an e4m3 number times the scale: coding it again changes nothing.
        again = codes.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        assert torch.allclose(again, codes, rtol=1e-6, atol=0)
    # The first layer's keys do not depend on other caches: their scale is exactly their range.
    assert float(result.program.weights.load("present.0.key.scale")) == pytest.approx(
        float(dense["present.0.key"].abs().max()) / 448, rel=1e-6
    )
    error = (dense["logits"] - coded["logits"]).abs().mean() / dense["logits"].std()
    # e4m3 keeps 3 bits: values are wrong by up to 1/16, and attention averages over some.
    assert 0 < float(error) < 0.1


def test_planning_reads_no_text(tiny_llama_program: Program) -> None:
    planned = QuantizeCache().run(tiny_llama_program, context(text=False, plan_only=True))
    real = QuantizeCache().run(tiny_llama_program, context())
    assert planned.achieved == real.achieved
    assert str(planned.program.graph) == str(real.program.graph)
    assert not planned.program.weights.has_values


def test_refusals(tiny_llama_program: Program, tiny_bert_program: Program) -> None:
    with pytest.raises(Refusal, match="CS4102"):
        QuantizeCache().run(tiny_llama_program, context(formats=()))
    with pytest.raises(UsageError, match="CS1121"):
        QuantizeCache().run(tiny_llama_program, context(text=False))
    with pytest.raises(ModelError, match="CS2206"):
        QuantizeCache().run(tiny_bert_program, context(plan_only=True))
