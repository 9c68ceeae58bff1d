"""Targets: what a runtime on some hardware can use, as data.

One YAML file per target under ``backends/targets/``; other packages add theirs through the entry-point group
``compile_sparse.targets`` (a function returning a folder of YAML files).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.targets.target_files import read_target_files

__all__ = ["Hardware", "LowRankGemms", "Precision", "SparsePattern", "Target", "find_target", "load_targets"]


Precision = Literal["fp32", "fp16", "bf16"]


class SparsePattern(BaseModel):
    """What a sparsity pattern is worth on a target."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str = Field(description="'N:M', 'unstructured' or 'block'; an exact one such as '2:4' wins over 'N:M'")
    pays: bool = Field(description="whether the runtime skips the zeros on this hardware")
    why: str = Field(description="the mechanism, one sentence")
    measured: str = Field(default="", description="figures with the setting they were measured in")
    instead: str = Field(default="", description="what to use on this target")
    min_in_features: int = Field(default=0, ge=0, description="contraction size (K) below which it does not pay")
    min_out_features: int = Field(default=0, ge=0, description="output size (N) below which it does not pay")
    in_features_multiple: int = Field(default=1, ge=1, description="K must be a multiple of this for a sparse kernel")
    out_features_multiple: int = Field(default=1, ge=1, description="N must be a multiple of this for a sparse kernel")
    formats: tuple[str, ...] = Field(
        default=(), description="number formats of GEMMs that have sparse kernels, such as fp16; empty: not said"
    )
    int8_outputs: bool = Field(
        default=False, description="whether an int8 GEMM must give int8 for its sparse kernel to be the faster one"
    )


class Hardware(BaseModel):
    """What a vendor's datasheet says of the hardware; peaks, never measurements."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory_gb: float = Field(gt=0, description="memory, 1e9 bytes")
    bandwidth_gb_s: float = Field(gt=0, description="of that memory, 1e9 bytes per second")
    dense_tflops: Mapping[str, float] = Field(
        description="format of the GEMMs (fp16, int8, fp8, fp4) -> 1e12 operations per second without sparsity"
    )
    source: str = Field(description="title of the datasheet, with its date or number")


class LowRankGemms(BaseModel):
    """What two thin GEMMs in place of one are worth on a target."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decode_pays_below: float = Field(
        gt=0, le=1, description="share of the dense parameters below which two factors run faster, one token at a time"
    )
    prefill_pays_below: float = Field(gt=0, le=1, description="the same for a prompt")
    extra_product_weights: int = Field(
        default=0, ge=0, description="weights that are read in the time one more GEMM takes to start, decoding"
    )
    measured: str = Field(description="figures with the setting they were measured in")


class Target(BaseModel):
    """The contract of one runtime on one class of hardware."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    name: str = Field(description="<runtime>-<hardware>")
    backend: str = Field(description="entry-point name of the backend")
    device: str = Field(description="cpu, cuda, ... as the runtime calls it")
    summary: str = Field(description="one sentence for 'targets'")
    baseline_precision: Precision = Field(description="precision of the dense baseline")
    precisions: tuple[Precision, ...] = Field(
        default=(), description="what --precision may choose instead; empty: the baseline's only"
    )
    keeps_precision: bool = Field(
        default=False,
        description="whether tensors keep the type they have in the model's files, where most have the precision of the run; "
        "that is the model's own where --precision says nothing, if it is among the precisions",
    )
    alignment: int = Field(ge=1, description="kept widths are multiples of this many elements")
    compute_capability: str = Field(default="", description="of an NVIDIA GPU, such as '8.0'")
    hardware: Hardware | None = Field(default=None, description="peaks from the vendor's datasheet")
    gpu: str = Field(default="", description="a word of the GPU's name as its driver tells it, such as 'A100'")
    schemes: Mapping[str, str] = Field(description="quantization scheme -> how this runtime executes it")
    refused_schemes: Mapping[str, str] = Field(
        default_factory=dict, description="scheme -> why it is not one of them, a sentence"
    )
    fallbacks: Mapping[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="scheme -> schemes that layers have instead whose outputs it would put too far off, fastest first; behind "
        "them stands floating point. Layers are measured for schemes that are named here only",
    )
    grouped_inputs: Literal["float", "int8"] = Field(
        default="float",
        description="what GEMMs of weights in groups and floating-point activations compute with; int8: activations rounded to 8 "
        "bits, one scale per group of weights",
    )
    cache_formats: Mapping[str, str] = Field(
        default_factory=dict, description="format of a quantized key-value cache -> how this runtime executes it"
    )
    whole_groups: bool = Field(
        default=False, description="whether groups of quantized weights must divide the contraction dimension"
    )
    scales: Literal["float32", "precision"] = Field(
        default="float32",
        description="type of the scales of schemes that quantize activations; precision: that of GEMMs. Scales of weights alone "
        "always have it",
    )
    logits: Literal["8-bit", "float"] = Field(default="8-bit", description="what quantization leaves of the lm_head")
    sparse_patterns: tuple[SparsePattern, ...] = Field(default=(), description="sparsity patterns and whether they pay")
    low_rank: LowRankGemms | None = Field(
        default=None, description="when two factors pay; null: whenever they have fewer parameters"
    )
    cache_may_change: bool = Field(
        default=True, description="whether key-value cache inputs and outputs may change shape (heads may be pruned)"
    )
    minimum_versions: Mapping[str, str] = Field(
        default_factory=dict, description="package -> lowest version that works"
    )

    def pattern(self, pattern: str) -> SparsePattern | None:
        """The most specific entry for ``pattern`` such as '2:4', or None when the target says nothing about it."""
        family = "N:M" if ":" in pattern and not pattern.startswith("block") else pattern
        by_name = {entry.pattern: entry for entry in self.sparse_patterns}
        return by_name.get(pattern) or by_name.get(family)

    def require_gpus(self, count: int) -> None:
        """Stop when a model cannot be split over ``count`` GPUs (tensor parallelism).

        Raises:
            UsageError: CS1042 on a target without GPUs.
        """
        if count > 1 and self.device != "cuda":
            raise UsageError(
                "CS1042",
                f"{self.name} has no GPUs to split a model over.",
                where=f"--tensor-parallel {count}",
                why=f"Its device is {self.device}.",
                hint="Leave the option out, or choose a GPU target.",
            )

    def require_precision(self, precision: str | None) -> None:
        """Stop when the target does not compute in ``precision``; None is its own.

        Raises:
            UsageError: CS1043.
        """
        choices = self.precisions or (self.baseline_precision,)
        if precision not in (None, self.baseline_precision, *choices):
            raise UsageError(
                "CS1043",
                f"{self.name} does not compute in {precision!r}.",
                where=f"--precision {precision}",
                why=f"It computes in {' or '.join(choices)}.",
                hint="Choose one of these, or leave the option out.",
            )


@cache
def load_targets() -> Mapping[str, Target]:
    """Every registered target by name, sorted.

    Raises:
        EnvironmentFailure: CS5001, a file that is not valid.
    """
    entries = sorted(entry_points(group="compile_sparse.targets"), key=lambda e: e.name)
    found: dict[str, Target] = {}
    for file in read_target_files((entry.name, Path(entry.load()())) for entry in entries):
        try:
            target = Target.model_validate(file.data)
        except ValidationError as error:
            raise file.invalid(str(error)) from error
        found[target.name] = target
    return dict(sorted(found.items()))


def find_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        UsageError: CS1001, with the nearest names.
    """
    targets = load_targets()
    if name in targets:
        return targets[name]
    near = difflib.get_close_matches(name, targets, n=3, cutoff=0.3)
    raise UsageError(
        "CS1001",
        f"There is no target {name!r}.",
        where="--target",
        why=f"Known targets: {', '.join(targets)}.",
        hint=f"Did you mean {' or '.join(near)}?" if near else "See 'compile-sparse targets'.",
    )
