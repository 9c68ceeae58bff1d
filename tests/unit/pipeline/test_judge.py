"""Which bound the runtime's answers are held to depends on what the passes say they do, never on what they are called."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from compile_sparse.compiler.artifact.report import Change, Fidelity, ModelSection, PassSection, Report
from compile_sparse.compiler.extension.pass_contract import Pass, PassContext, PassResult, Phase
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.pipeline.compilation import judge
from compile_sparse.compiler.pipeline.runner import run_passes
from compile_sparse.compiler.recipes.recipe import recipe_from_yaml
from compile_sparse.compiler.verify.measure import Measured
from compile_sparse.compiler.verify.same_model import TOP1_WITHOUT_NOISE, TOP1_WITHOUT_NOISE_QUANTIZED
from tests.installing import install
from tests.support.contexts import context
from tests.toys import toy_program
from tests.unit.passes.running import Linear

AGREEMENT = 0.98
"""Below what a floating-point model must reach, above what a quantized one must."""


class _Idle(Pass):
    """Says that it did something, though it did nothing."""

    phase: ClassVar[Phase] = "quantization"
    modified: ClassVar[bool] = True

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult(program, modified=self.modified)


class Gptq(_Idle):
    name: ClassVar[str] = "gptq"
    changes_numerics: ClassVar[bool] = True


class QuantizeNothing(_Idle):
    name: ClassVar[str] = "quantize-nothing"
    changes_numerics: ClassVar[bool] = False


class FoundNothing(Gptq):
    name: ClassVar[str] = "found-nothing"
    modified: ClassVar[bool] = False


def judged(*sections: PassSection) -> Report:
    fidelity = Fidelity(tokens=1000, top1_agreement=AGREEMENT)
    report = Report(
        target="null",
        verdict="unverified",
        model=ModelSection(parameters=Change(baseline=2, compiled=1)),
        passes=sections,
    )
    measured = Measured(runtime=None, fidelity=fidelity, baseline_fidelity=fidelity, performance=None, quality=None)
    return judge(report, measured, ())


@pytest.mark.parametrize(("name", "accepted"), [("gptq", True), ("quantize-nothing", False), ("found-nothing", False)])
def test_a_pass_of_others_gets_the_bound_of_what_it_does(
    monkeypatch: pytest.MonkeyPatch, name: str, accepted: bool
) -> None:
    assert TOP1_WITHOUT_NOISE_QUANTIZED < AGREEMENT < TOP1_WITHOUT_NOISE
    made = {"gptq": Gptq, "quantize-nothing": QuantizeNothing, "found-nothing": FoundNothing}
    install(monkeypatch, "compile_sparse.passes", made)
    passes = recipe_from_yaml(f"passes: [{name}]").build_passes()
    _, sections = run_passes(toy_program(Linear(torch.ones(3, 4)), [torch.zeros(2, 4)]), passes, context())
    assert [gate.passed for gate in judged(*sections).gates] == ([] if accepted else [False])


def test_one_pass_that_changes_numerics_decides() -> None:
    still, moved = (PassSection(name="p", changes_numerics=changes) for changes in (False, True))
    assert judged(still).gates
    assert not judged(still, moved).gates


def test_a_report_that_does_not_say_is_not_accused() -> None:
    assert not judged(PassSection.model_validate({"name": "quantize"})).gates
