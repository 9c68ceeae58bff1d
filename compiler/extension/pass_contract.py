"""What a pass promises. Third parties register theirs in the entry-point group ``compile_sparse.passes``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from compile_sparse.compiler.targets.workload import Workload

if TYPE_CHECKING:
    from compile_sparse.compiler.diagnostics import Diagnostic
    from compile_sparse.compiler.execution.calibration import CalibrationStream
    from compile_sparse.compiler.ir.program import Program
    from compile_sparse.compiler.progress import Progress
    from compile_sparse.compiler.targets.target import Target

__all__ = ["Pass", "PassContext", "PassResult", "ZeroingPass"]


@dataclass(frozen=True)
class PassContext:
    """What a pass may use besides the program.

    Attributes:
        target: the contract of the runtime and hardware compiled for.
        calibration: text the model is observed on, or None.
        progress: where long work reports; never None (a silent one exists).
        plan_only: weights are absent or must not be read: decide sizes, not values.
        seed: for anything random.
        contraction_multiple: contraction dimensions should be multiples of this, or a later quantization's groups do not
            divide them. Kept sizes are multiples of it and of the target's alignment, where such a size exists.
        workload: what is optimised for.
    """

    target: Target
    progress: Progress
    calibration: CalibrationStream | None = None
    plan_only: bool = False
    seed: int = 0
    contraction_multiple: int = 1
    workload: Workload = field(default_factory=Workload)


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        program: the new program (the old one is untouched).
        modified: whether anything changed; the runner checks it against a structural digest.
        requested, achieved: the amounts, for the report.
        skips: everything left alone, with reasons.
        notes: sentences for people.
    """

    program: Program
    modified: bool
    requested: Mapping[str, Any] = field(default_factory=dict)
    achieved: Mapping[str, Any] = field(default_factory=dict)
    skips: Sequence[Diagnostic] = ()
    notes: Sequence[str] = ()


class Pass(Protocol):
    """One transformation. Entry-point group ``compile_sparse.passes``; the entry is a pydantic model class (the pass's options
    are its fields) with these members. ``phase`` is one of ``pass_registry.PHASES``; a recipe in another order is refused, and
    one with two passes that treat the same things: those of the same name, unless they have an attribute ``treats`` (names of
    things) that says otherwise.
    """

    name: str
    phase: str

    def run(self, program: Program, context: PassContext) -> PassResult: ...


@runtime_checkable
class ZeroingPass(Protocol):
    """A pass that leaves zeros in place: whether they are worth anything is the target's to say.

    Attributes:
        zero_fraction: share of the weights it treats that become zero.
    """

    @property
    def zero_fraction(self) -> float: ...

    def useless_on(self, target: Target) -> Sequence[Diagnostic]:
        """Reasons why ``target`` cannot exploit the zeros; compiling then needs ``--allow-useless``."""
        ...
