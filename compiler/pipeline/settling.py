"""The choices of a run, checked against its target before any long work starts."""

from __future__ import annotations

from compile_sparse.compiler.extension.backend_options import RunFacts
from compile_sparse.compiler.extension.backends import options_for
from compile_sparse.compiler.extension.run_settings import RunSettings
from compile_sparse.compiler.recipes.building import Building
from compile_sparse.compiler.targets.target import Target

__all__ = ["settle_run"]


def settle_run(target: Target, building: Building, run: RunFacts) -> RunSettings:
    """What ``building`` and the workload choose on ``target``.

    Raises:
        UsageError: CS1042 no GPUs to split over, CS1043 a precision the target does not have, CS1046 an option of another
            backend, CS1105 a wrong option, and what the backend's own options say.
    """
    target.require_gpus(run.workload.tensor_parallel)
    target.require_precision(building.precision)
    own = run.stored if target.keeps_precision and run.stored in target.precisions else None
    precision = building.precision or own
    return RunSettings(
        precision=None if precision == target.baseline_precision else precision,
        tensor_parallel=run.workload.tensor_parallel,
        image_size=building.image_size,
        options=options_for(target, building.options).settle(target, run),
    )
