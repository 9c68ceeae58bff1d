"""What one run adds to its target: chosen once, then handed to passes and to the backend's verbs beside the target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from compile_sparse.compiler.extension.backend_options import BackendOptions
from compile_sparse.compiler.targets.target import Precision, Target

__all__ = ["DEFAULT_SETTINGS", "RunSettings"]


@dataclass(frozen=True)
class RunSettings:
    """The choices of one run; as it stands, none: the target's defaults.

    Attributes:
        precision: of what is not quantized, in the baseline too; None is the target's own.
        tensor_parallel: GPUs the model is split over.
        image_size: height and width of images, where the model's own are not meant.
        options: settled options of the target's backend (see ``BackendOptions.settle``); None where nothing is known of the run.
        verifying: options of ``compile-sparse verify``, while an artifact is measured again.
    """

    precision: Precision | None = None
    tensor_parallel: int = 1
    image_size: tuple[int, int] | None = None
    options: BackendOptions | None = None
    verifying: BackendOptions | None = None

    def precision_on(self, target: Target) -> Precision:
        """Precision of what is not quantized."""
        return self.precision or target.baseline_precision

    def for_baseline(self, *, runs_here: bool) -> RunSettings:
        """The same choices for the dense baseline."""
        options = None if self.options is None else self.options.for_baseline(runs_here=runs_here)
        return replace(self, options=options, verifying=None)

    def identity(self) -> dict[str, Any]:
        """What of this decides an artifact, as plain data; how it is verified does not."""
        return {
            "precision": self.precision,
            "tensor_parallel": self.tensor_parallel,
            "image_size": self.image_size,
            "options": None if self.options is None else self.options.model_dump(mode="json"),
        }


DEFAULT_SETTINGS = RunSettings()
"""A run that chooses nothing."""
