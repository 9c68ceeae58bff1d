"""Everything a compilation needs, read and checked before any long work starts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compile_sparse.compiler.capture.folder import ModelFolder, is_causal, open_folder
from compile_sparse.compiler.capture.side_files import check_folder
from compile_sparse.compiler.capture.stored import stored_tensors
from compile_sparse.compiler.capture.tasks import task_of
from compile_sparse.compiler.diagnostics import Diagnostic
from compile_sparse.compiler.errors import Refusal, UsageError
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.extension.backend_contract import Backend, Probe
from compile_sparse.compiler.extension.backend_options import RunFacts
from compile_sparse.compiler.extension.backends import find_backend
from compile_sparse.compiler.extension.deployments import Deployment, find_deployment
from compile_sparse.compiler.extension.pass_contract import Pass, PassContext, ZeroingPass
from compile_sparse.compiler.extension.run_settings import RunSettings
from compile_sparse.compiler.files.cache import cache_key
from compile_sparse.compiler.ir.model_facts import context_length
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.pipeline.imported import KeepCodes
from compile_sparse.compiler.pipeline.settling import settle_run
from compile_sparse.compiler.pipeline.source_types import source_precision
from compile_sparse.compiler.pipeline.text_reader import DEFAULT_WINDOW_TOKENS, SAMPLE_TOKENS, TextReader
from compile_sparse.compiler.progress import Progress
from compile_sparse.compiler.recipes.recipe import Recipe
from compile_sparse.compiler.targets.target import Precision, Target, find_target
from compile_sparse.compiler.targets.workload import Workload
from compile_sparse.compiler.verify.evaluation.models import EvaluationSlice
from compile_sparse.compiler.verify.evaluation.reader import EvaluationReader
from compile_sparse.compiler.version import code_identity, library_versions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "Job",
    "baseline_key",
    "fit_workload",
    "longest_window",
    "prepare",
    "read_evaluation",
    "runtime_threads",
]


@dataclass(frozen=True)
class Job:
    """A model, a target and what to do.

    Attributes:
        folder: the opened model.
        target, backend, probe: where it goes, and whether that runs here.
        settings: what the run chose on that target.
        recipe, passes: what is done.
        calibration: windows the passes observe, or None.
        slices: evaluation windows by slice name (decoders).
        evaluation: what else is measured, by slice name (other models).
        sample: windows of packaged text, for checks where the user gave none; empty for models without a tokenizer.
        workload: what speed is measured on, fitting the model's context.
        useless: what the target cannot exploit although it was asked for.
        deployments: what is written beside the model.
    """

    folder: ModelFolder
    target: Target
    settings: RunSettings
    backend: Backend
    probe: Probe
    recipe: Recipe
    passes: tuple[Pass, ...]
    calibration: CalibrationStream | None
    slices: Mapping[str, Sequence[Sequence[int]]]
    evaluation: Mapping[str, EvaluationSlice]
    workload: Workload
    useless: tuple[Diagnostic, ...]
    deployments: tuple[Deployment, ...] = ()
    sample: Sequence[Sequence[int]] = ()

    @cached_property
    def source_digest(self) -> str:
        """sha256 identity of the source model."""
        return self.folder.digest()

    @cached_property
    def canonical_recipe(self) -> dict[str, Any]:
        """The recipe with digests of its files, as they were when the run began."""
        return self.recipe.canonical()

    def context(self, progress: Progress, *, plan_only: bool = False) -> PassContext:
        """What the passes are given."""
        return PassContext(
            target=self.target,
            progress=progress,
            calibration=self.calibration,
            sample=CalibrationStream(tuple(map(tuple, self.sample))) if self.sample else None,
            plan_only=plan_only,
            seed=self.recipe.seed,
            contraction_multiple=math.lcm(*(step.contraction_multiple for step in self.passes)),
            workload=self.workload,
            settings=self.settings,
        )

    def steps(self, captured: Program) -> tuple[Pass, ...]:
        """What ``captured`` goes through: the passes and, for a quantized checkpoint, the return of its codes."""
        if self.folder.quantization is None:
            return self.passes
        early = [step for step in self.passes if step.phase != "quantization"]
        keeping = KeepCodes(method=self.folder.quantization.name, captured=captured)
        return (*early, keeping, *(step for step in self.passes if step.phase == "quantization"))

    @property
    def text(self) -> Sequence[Sequence[int]]:
        """Windows that the artifact is checked on: evaluation text, or that of the calibration, or the packaged sample."""
        evaluated = [window for windows in self.slices.values() for window in windows]
        given = evaluated or (self.calibration.windows if self.calibration else ())
        # Windows shorter than a check's would be filled up with drawn ids.
        return [window for window in given if len(window) >= SAMPLE_TOKENS] or self.sample or given

    @cached_property
    def key(self) -> str:
        """Digest of everything the artifact depends on."""
        return cache_key(
            {
                "kind": "artifact",
                "source": self.source_digest,
                "recipe": self.canonical_recipe,
                "target": self.target.model_dump(mode="json"),
                "settings": self.settings.identity(),
                "side files": self.folder.side_files_digest(),
                "code": code_identity(),
                "libraries": library_versions(),
                "runtime": self.probe.version,
                "processor": self.probe.processor,
            }
        )

    @property
    def precision(self) -> Precision:
        """Of what is not quantized, in the baseline too."""
        return self.settings.precision_on(self.target)

    @property
    def vocabulary(self) -> int:
        """Number of token ids; 0 for models without tokens."""
        return int(getattr(self.folder.config, "vocab_size", 0) or 0)

    def refuse_deployment(self, kind: str) -> None:
        """Stop here when a model of this kind cannot be deployed as asked.

        Raises:
            Refusal: the first reason.
        """
        for deployment in self.deployments:
            for diagnostic in deployment.refusals(kind, self.target, self.settings):
                raise diagnostic.refusal(f"This model cannot be written for {deployment.name}.")

    def refuse_useless(self) -> None:
        """Stop here when something was asked for that the target cannot exploit.

        Raises:
            Refusal: CS4103 with the arithmetic.
        """
        if self.useless:
            first = self.useless[0]
            raise Refusal(
                first.code,
                f"{self.target.name} gains nothing from {first.where}.",
                where=first.where,
                why=first.why,
                hint=f"{first.hint} --allow-useless compiles it anyway.".strip(),
            )


def baseline_key(source_digest: str, target: Target, settings: RunSettings, runtime_version: str) -> str:
    """Cache key of the dense baseline of a model on a target, built with ``settings``."""
    return cache_key(
        {
            "kind": "baseline",
            "source": source_digest,
            "target": target.model_dump(mode="json"),
            "settings": settings.identity(),
            "code": code_identity(),
            "libraries": library_versions(),
            "runtime": runtime_version,
        }
    )


def fit_workload(workload: Workload, context: int | None) -> Workload:
    """``workload`` when its requests fit the model's context; the default one is shortened to fit.

    Raises:
        UsageError: CS1040 when the user asked for requests that are too long.
    """
    length, usual = workload.prompt + workload.output, Workload()
    if context is None or length <= context:
        return workload
    shorter = {"prompt": max(1, context // 2), "output": max(1, context // 4)}
    if (workload.prompt, workload.output) == (usual.prompt, usual.output):
        return workload.model_copy(update=shorter)
    raise UsageError(
        "CS1040",
        f"The workload's requests of {length} tokens are longer than the model allows.",
        where="--workload",
        why=f"prompt={workload.prompt} and output={workload.output}; the model's longest sequence is {context} tokens.",
        hint=f"For example --workload prompt={shorter['prompt']},output={shorter['output']}.",
    )


def runtime_threads(requested: int | None) -> int:
    """Threads given to the runtime: the request, ``OMP_NUM_THREADS``, or the processors this process may use."""
    if requested:
        return requested
    declared = os.environ.get("OMP_NUM_THREADS", "")
    if declared.isdigit() and int(declared) > 0:
        return int(declared)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def prepare(model: str | Path, target_name: str, recipe: Recipe) -> Job:
    """Open and check everything.

    Raises:
        UsageError, ModelError, Refusal: whatever is wrong with the model, target, recipe or data files.
    """
    target = find_target(target_name)  # a wrong name is said before the model is opened
    passes = recipe.build_passes()
    folder = open_folder(model)
    _require_images(recipe, folder.model_class)
    check_folder(folder.path)
    text = TextReader(folder.config.to_dict(), folder.path, recipe.bos)
    longest = context_length(folder.config.to_dict())
    context = longest if is_causal(folder.model_class) else None
    workload = fit_workload(recipe.workload, context)
    settings = settle_run(
        target,
        recipe.building,
        RunFacts(
            workload,
            longest,
            longest_window(recipe, longest),
            causal=is_causal(folder.model_class),
            stored=source_precision(folder),
        ),
    )
    backend = find_backend(target)
    useless = tuple(
        replace(diagnostic, why=f"{diagnostic.why} {_arithmetic(folder, step)}".strip())
        for step in passes
        if isinstance(step, ZeroingPass)
        for diagnostic in step.useless_on(target)
    )
    return Job(
        folder=folder,
        target=target,
        settings=settings,
        backend=backend,
        probe=backend.probe(target),
        recipe=recipe,
        passes=passes,
        calibration=text.calibration(recipe),
        slices=text.slices(recipe) if is_causal(folder.model_class) else {},
        evaluation=read_evaluation(recipe, folder.path, folder.config, folder.model_class),
        workload=workload,
        deployments=tuple(find_deployment(name) for name in recipe.building.emit),
        useless=useless,
        sample=text.sample(),
    )


def read_evaluation(
    recipe: Recipe, folder: Path, config: PretrainedConfig, model_class: type
) -> dict[str, EvaluationSlice]:
    """Evaluation data of a model that does not generate, by slice name; of one that does: nothing, it has windows of text.

    Args:
        recipe: names the files.
        folder: where tokenizer, pooling and preprocessing files are.
        config, model_class: of the model.
    """
    if is_causal(model_class):
        return {}
    wanted = recipe.evaluation
    reader = EvaluationReader(folder, config, model_class, wanted.sequence_length, recipe.building.image_size)
    return {name: reader.read(Path(file), wanted.samples) for name, file in wanted.slices.items()}


def _require_images(recipe: Recipe, model_class: type) -> None:
    if recipe.building.image_size is not None and task_of(model_class) != "vision":
        raise UsageError(
            "CS1062",
            f"{model_class.__name__} reads no images.",
            where="--image-size",
            why="It chooses the size of the images a model takes.",
            hint="Leave it out.",
        )


def longest_window(recipe: Recipe, context: int | None) -> int:
    """Tokens of the longest text the artifact will be checked on."""
    wanted = recipe.evaluation.sequence_length or DEFAULT_WINDOW_TOKENS
    return min(wanted, context or wanted)


def _arithmetic(folder: ModelFolder, step: ZeroingPass) -> str:
    """What the zeros would amount to in this model, from the headers of its weight files."""
    tensors = stored_tensors(folder, torch.float32, required=False).values()
    weights = sum(t.shape[0] * t.shape[1] for t in tensors if len(t.shape) == 2)
    if not weights:
        return ""
    return (
        f"In this model: {step.zero_fraction:.0%} of {weights:,} matrix weights would be zero, the file would keep all "
        f"{4 * weights / 1e6:,.1f} MB of them in fp32, and no multiplication would be skipped."
    )
