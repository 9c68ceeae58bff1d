"""What one backend can be asked beyond what every backend can.

A backend declares a model of its own, ``Backend.options``: the model's fields are the backend's keys in a recipe's ``building``,
its keyword arguments in Python and its flags on the command line. Nothing else has to know them. ``Backend.verify_options``
does the same for ``compile-sparse verify``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict

from compile_sparse.compiler.targets.target import Precision, Target
from compile_sparse.compiler.targets.workload import Workload

__all__ = ["BackendOptions", "RunFacts", "Vouched"]


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run before anything is captured.

    Attributes:
        workload: what speed is measured on, fitting the model's context.
        context: the model's longest sequence in tokens, or None when its config states none.
        longest_window: tokens of the longest text the artifact will be checked on.
        causal: whether the model generates, and so has a key-value cache.
        stored: precision of the model's weight files; None where they are not there, or of another type.
    """

    workload: Workload
    context: int | None = None
    longest_window: int = 0
    causal: bool = True
    stored: Precision | None = None


@dataclass(frozen=True)
class Vouched:
    """Files of an artifact that may be others than those recorded, because the user vouches for them.

    Attributes:
        suffix: of their names.
        note: a sentence for the report.
    """

    suffix: str
    note: str


class BackendOptions(BaseModel):
    """Options of one backend; this class itself has none.

    Its fields are validated before anything heavy is imported, so the module of a backend's class imports neither torch nor a
    vendor's package.

    Attributes:
        elsewhere: why, and what to do, when one of the options is given for a target of another backend; two sentences.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    elsewhere: ClassVar[tuple[str, str]] = (
        "It is an option of another backend.",
        "Leave the option out, or choose a target of that backend.",
    )

    def settle(self, target: Target, run: RunFacts) -> BackendOptions:
        """Everything that these options decide of an artifact, nothing left open: what ``lower`` is given. Its fields are part of
        the artifact's identity.

        Raises:
            UsageError: the options contradict the model or the workload.
        """
        return self

    def for_baseline(self, *, runs_here: bool) -> Self:
        """Settled options for the dense baseline: nothing that is not measured.

        Args:
            runs_here: whether the target's runtime is here; another one is measured otherwise.
        """
        return self

    def vouched(self) -> Vouched | None:
        """Options of ``verify``: which files of the artifact are not compared with what was recorded."""
        return None
