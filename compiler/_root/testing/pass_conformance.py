"""Does a pass keep its contract (``compiler/extension/pass_contract.py``)?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compile_sparse.compiler.errors import CompileSparseError, EnvironmentFailure
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.extension.pass_contract import Pass, PassContext, PassResult
from compile_sparse.compiler.extension.passes import what_lacks
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.verifier import InvalidProgram
from compile_sparse.compiler.pipeline.runner import run_passes
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import Target, find_target
from compile_sparse.testing.conformance import NonConforming, require
from compile_sparse.testing.models import example_inputs
from compile_sparse.testing.programs import calibration_for, contents, tiny_program, without_weights

__all__ = ["check_pass"]


def check_pass(
    step: Pass,
    programs: Sequence[Program] | None = None,
    *,
    target: Target | None = None,
    sizes_follow_values: bool = False,
) -> None:
    """Run ``step`` and hold it to every rule of its contract that can be observed from outside.

    The class is complete; options survive JSON; the program given stays as it was; the result is a valid program, keeps masks,
    and ``modified`` is the truth; the same input gives the same output, bit for bit; planning needs no weights and gives the
    same shapes; what is computed is finite.

    Args:
        step: the pass with its options.
        programs: what it is run on; tiny Llama, GPT-2, BERT and ResNet when left out. It may refuse some with an error of
            ``compiler/errors.py``, not all.
        target: compiled for; ``null`` when left out.
        sizes_follow_values: which sizes are left depends on values (a global ranking, say), so plans may say others.

    Raises:
        NonConforming: naming the rule.
    """
    name = getattr(step, "name", type(step).__name__)
    lacking = what_lacks(name, type(step))
    require(not lacking, "A pass is a complete subclass of Pass", name, lacking)
    again = type(step).model_validate(step.model_dump(mode="json"))
    require(again == step, "Options survive being written as JSON", name, f"{step!r} became {again!r}")
    refusals: list[str] = []
    given = [tiny_program(each) for each in ("llama", "gpt2", "bert", "resnet")] if programs is None else programs
    for program in given:
        context = PassContext(target or find_target("null"), SilentProgress(), calibration_for(program))
        try:
            _check_on(step, program, context, sizes_follow_values=sizes_follow_values)
        except EnvironmentFailure:
            raise
        except CompileSparseError as error:
            refusals.append(f"{_label(program)}: {error.code} {error.what}")
    require(len(refusals) < len(given), "A pass does something for some model", name, "; ".join(refusals))


def _check_on(step: Pass, program: Program, context: PassContext, *, sizes_follow_values: bool) -> None:
    where = f"{step.name} on {_label(program)}"
    before = contents(program)
    result = _run(step, program, context, where)
    require(contents(program) == before, "The program that a pass is given stays as it was", where)
    try:
        run_passes(program, [step], context, verify_each=True)
    except InvalidProgram as error:
        raise NonConforming(
            f"A pass gives a valid program and says truly whether it changed ({where}): {error}"
        ) from error
    after = contents(result.program)
    repeated = contents(_run(step, program, context, where).program)
    require(after == repeated, "The same program and seed give the same result, bit for bit", where)
    planning = PassContext(context.target, context.progress, context.calibration, plan_only=True)
    planned = _run(step, without_weights(program), planning, where).program
    if not sizes_follow_values:
        same = contents(planned, values=False) == contents(result.program, values=False)
        require(same, "A plan has the shapes that the pass makes", where)
    computed = Executor(result.program).run(example_inputs(result.program, 2, 7))
    finite = all(bool(torch.isfinite(value).all()) for value in computed.values() if value.is_floating_point())
    require(finite, "What the result computes is finite", where)


def _run(step: Pass, program: Program, context: PassContext, where: str) -> PassResult:
    result = step.run(program, context)
    require(isinstance(result, PassResult), "run returns a PassResult", where, f"{type(result).__name__}")
    return result


def _label(program: Program) -> str:
    return str((program.config.get("architectures") or [program.kind])[0])
