"""A factored program lowers like any other: two GEMMs in place of one, in every form of linear."""

from __future__ import annotations

import pytest

from compile_sparse.backends.onnxruntime import OnnxRuntimeBackend
from compile_sparse.compiler.execution.executor import Executor
from compile_sparse.compiler.extension.pass_contract import PassContext
from compile_sparse.compiler.progress import SilentProgress
from compile_sparse.compiler.targets.target import find_target
from compile_sparse.passes.low_rank import LowRank
from compile_sparse.passes.quantize import Quantize
from compile_sparse.testing.models import example_inputs
from tests.onnxruntime.running import run, session
from tests.support.tolerance import fp32_tolerance


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("scheme", ["", "w8a8"])
def test_the_runtime_computes_what_the_program_does(captured, tmp_path, name, scheme):
    target = find_target("ort-cpu").model_copy(update={"alignment": 8, "low_rank": None})
    context = PassContext(target, SilentProgress())
    program = LowRank(fraction=0.4).run(captured(name), context).program
    factored = sum(".inner." in tensor for tensor in program.weights)
    assert factored >= 8
    if scheme:
        program = Quantize(scheme=scheme).run(program, context).program
    OnnxRuntimeBackend().lower(program, target, tmp_path, SilentProgress())

    inputs = example_inputs(program, 1, 7)
    wanted = Executor(program).run(inputs)["logits"]
    found = run(session(tmp_path), inputs)["logits"]
    if scheme:  # 8-bit activations: a rounding that falls the other way moves a value by 2^-7 of the largest
        assert (found - wanted).abs().max() <= 2**-5 * wanted.abs().max()
    else:
        assert (found - wanted).abs().max() <= fp32_tolerance(wanted, depth=17)  # two GEMMs for one, twice four layers
