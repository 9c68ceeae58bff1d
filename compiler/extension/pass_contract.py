"""What a pass promises. Third parties register theirs in the entry-point group ``compile_sparse.passes``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict

from compile_sparse.compiler.extension.run_settings import DEFAULT_SETTINGS, RunSettings
from compile_sparse.compiler.targets.workload import Workload

if TYPE_CHECKING:
    from compile_sparse.compiler.diagnostics import Diagnostic
    from compile_sparse.compiler.execution.calibration import CalibrationStream
    from compile_sparse.compiler.ir.program import Program
    from compile_sparse.compiler.progress import Progress
    from compile_sparse.compiler.targets.target import Target

__all__ = ["PHASES", "Pass", "PassContext", "PassResult", "Phase", "ZeroingPass"]

Phase = Literal["structural", "depth", "low-rank", "masks", "recovery", "quantization"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""Order of phases. Shapes first, then zeros, then integers: each later phase would undo or hide an earlier one's freedom."""


@dataclass(frozen=True)
class PassContext:
    """What a pass may use besides the program.

    Attributes:
        target: the contract of the runtime and hardware compiled for.
        calibration: text the model is observed on, or None.
        sample: a little packaged text, for statistics that any text is better for than none; None for models that read none.
        progress: where long work reports; never None (a silent one exists).
        plan_only: weights are absent or must not be read: decide sizes, not values.
        seed: for anything random.
        contraction_multiple: contraction dimensions should be multiples of this, or a later quantization's groups do not
            divide them. Kept sizes are multiples of it and of the target's alignment, where such a size exists.
        workload: what is optimised for.
        settings: what the run chose besides: precision and number of GPUs.
    """

    target: Target
    progress: Progress
    calibration: CalibrationStream | None = None
    sample: CalibrationStream | None = None
    plan_only: bool = False
    seed: int = 0
    contraction_multiple: int = 1
    workload: Workload = field(default_factory=Workload)
    settings: RunSettings = DEFAULT_SETTINGS


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        program: the new program (the old one is untouched).
        modified: whether anything changed; the runner checks it against a structural digest.
        requested, achieved: the amounts, for the report.
        diagnostics: everything left alone, with reasons.
        notes: sentences for people.
    """

    program: Program
    modified: bool
    requested: Mapping[str, Any] = field(default_factory=dict)
    achieved: Mapping[str, Any] = field(default_factory=dict)
    diagnostics: Sequence[Diagnostic] = ()
    notes: Sequence[str] = ()


class Pass(BaseModel, ABC):
    """One transformation of a program: a subclass with class attributes, options as fields, and ``run``.

    Registered in the entry-point group ``compile_sparse.passes`` under its own name and checked when it is loaded. Nothing is
    decided by what a pass is called.

    Attributes:
        name: what recipes and reports call it.
        phase: when it runs; a recipe in another order than that of ``PHASES`` is refused.
        changes_numerics: whether computed values may differ from the dense model's by more than rounding because numbers are
            quantized. The runtime's answers are then compared with the program's under the bound for quantized models.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    phase: ClassVar[Phase]
    changes_numerics: ClassVar[bool]

    @property
    def treats(self) -> frozenset[str]:
        """What it takes from, or changes: a recipe with two passes that treat the same thing is refused."""
        return frozenset({self.name})

    @property
    def contraction_multiple(self) -> int:
        """Earlier passes keep contraction dimensions at multiples of this, where they can."""
        return 1

    @abstractmethod
    def run(self, program: Program, context: PassContext) -> PassResult:
        """A new program; the one given stays as it is."""


class ZeroingPass(Pass):
    """A pass that leaves zeros in place: whether they are worth anything is the target's to say."""

    @property
    @abstractmethod
    def zero_fraction(self) -> float:
        """Share of the weights it treats that become zero."""

    @abstractmethod
    def useless_on(self, target: Target) -> Sequence[Diagnostic]:
        """Reasons why ``target`` cannot exploit the zeros; compiling then needs ``--allow-useless``."""
