"""For those who extend compile-sparse: checks that a pass, quantizer, backend or target keeps its contract, tiny models to try it
on, and oracles that prove a coupling of axes.

    from compile_sparse.testing import check_pass

    def test_my_pass():
        check_pass(MyPass(fraction=0.25))
"""

from compile_sparse.testing.backend_conformance import check_backend
from compile_sparse.testing.conformance import NonConforming
from compile_sparse.testing.models import MODELS, build_model, example_inputs
from compile_sparse.testing.pass_conformance import check_pass
from compile_sparse.testing.programs import calibration_for, tiny_program
from compile_sparse.testing.quantizer_conformance import check_quantizer
from compile_sparse.testing.target_conformance import check_target

__all__ = [
    "MODELS",
    "NonConforming",
    "build_model",
    "calibration_for",
    "check_backend",
    "check_pass",
    "check_quantizer",
    "check_target",
    "example_inputs",
    "tiny_program",
]
