"""What can be asked of TensorRT artifacts, and what follows from it for the engines. Imports no vendor package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from compile_sparse.backends.tensorrt.layout import ENGINE_SUFFIX
from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.extension.backend_options import BackendOptions, RunFacts, Vouched
from compile_sparse.compiler.extension.run_settings import RunSettings
from compile_sparse.compiler.ir.model_facts import context_length
from compile_sparse.compiler.targets.target import Target

__all__ = ["LONGEST_CACHE", "EngineSettings", "TensorRtOptions", "TensorRtVerifyOptions", "engine_settings"]

LONGEST_CACHE = 4096
"""Tokens a cache of static length holds when nothing else is said: its buffers are allocated whole."""
EngineKind = Literal["auto", "none", "rtx-aot"]
_ELSEWHERE = (
    "Its runtime builds no engines and grows its key-value cache as needed.",
    "Leave the option out, or choose a TensorRT target.",
)


class EngineSettings(BackendOptions):
    """What engines are built for."""

    batch: int = Field(ge=1, description="requests or samples at once that kernels are chosen for")
    largest_batch: int = Field(ge=1, description="most requests or samples at once")
    prompt: int = Field(ge=1, description="prompt length in tokens that kernels are chosen for")
    max_length: int = Field(ge=1, description="prompt and output tokens that fit the key-value cache")
    engine: EngineKind = Field(default="auto", description="see TensorRtOptions")
    checkpoint: bool = Field(default=True, description="whether the model is also written as a Hugging Face checkpoint")

    def for_baseline(self, *, runs_here: bool) -> Self:
        """No checkpoint beside, and an engine only where one can be measured."""
        return self.model_copy(update={"engine": "auto" if runs_here else "none", "checkpoint": False})


class TensorRtOptions(BackendOptions):
    """Options of a compilation."""

    elsewhere: ClassVar[tuple[str, str]] = _ELSEWHERE

    max_length: int | None = Field(
        default=None,
        ge=2,
        le=10_000_000,
        description="prompt and output tokens that fit the key-value cache, 2 to 10,000,000, where its length is static; "
        "null: the model's longest, up to 4,096",
    )
    engine: EngineKind = Field(
        default="auto",
        description="auto: an engine where the target's GPU is at hand, elsewhere a check that the graph builds; none: the graph "
        "only; rtx-aot: a TensorRT-RTX engine, built without a GPU",
    )

    def settle(self, target: Target, run: RunFacts) -> EngineSettings:
        """Shapes from the workload, and a cache that the requests and the texts of the evaluation fit.

        Raises:
            UsageError: CS1046 a model split over GPUs, or a length for a model without a cache; CS1047 a cache that is shorter
                than the workload or longer than the model allows.
        """
        work = run.workload
        if work.tensor_parallel > 1:
            raise UsageError(
                "CS1046",
                f"{target.name} builds for one GPU.",
                where=f"--tensor-parallel {work.tensor_parallel}",
                why="Its graph and engines are not split.",
                hint="Leave the option out, or choose a vllm target.",
            )
        wanted = work.prompt + work.output if run.causal else 1
        self._require_length(run)
        length = self.max_length or max(min(LONGEST_CACHE, run.context or LONGEST_CACHE), wanted, run.longest_window)
        if length < wanted:
            raise UsageError(
                "CS1047",
                "The requests do not fit the key-value cache.",
                where=f"--max-length {length}",
                why=f"The workload has {work.prompt} prompt and {work.output} output tokens.",
                hint=f"Give --max-length {wanted} or more, or a shorter --workload.",
            )
        return EngineSettings(
            batch=work.levels[0],
            largest_batch=max(8, *work.levels),
            prompt=work.prompt,
            max_length=min(length, run.context) if run.context else length,
            engine=self.engine,
        )

    def _require_length(self, run: RunFacts) -> None:
        length = self.max_length
        if length is not None and not run.causal:
            raise UsageError(
                "CS1046",
                "--max-length means nothing for this model.",
                where=f"--max-length {length}",
                why="It is the length of a key-value cache, and the model has none.",
                hint="Leave the option out.",
            )
        if length is not None and run.context is not None and length > run.context:
            raise UsageError(
                "CS1047",
                "The key-value cache would be longer than the model allows.",
                where=f"--max-length {length}",
                why=f"The model's longest sequence is {run.context:,} tokens.",
                hint=f"Give --max-length {run.context} or less.",
            )


class TensorRtVerifyOptions(BackendOptions):
    """Options of measuring an artifact again."""

    elsewhere: ClassVar[tuple[str, str]] = _ELSEWHERE

    allow_foreign_engine: bool = Field(
        default=False,
        description="load engines that are not those that were built; an engine is a program: do this only if you trust it",
    )

    def vouched(self) -> Vouched | None:
        """Engines, when they are vouched for."""
        if not self.allow_foreign_engine:
            return None
        return Vouched(
            ENGINE_SUFFIX,
            "The engines were not compared with those that were built (--allow-foreign-engine): "
            "what was measured may be another model's.",
        )


def engine_settings(settings: RunSettings, config: Mapping[str, Any]) -> EngineSettings:
    """What engines are built for, within what the model of ``config`` can do."""
    context = context_length(config)
    if isinstance(settings.options, EngineSettings):
        found = settings.options
    else:  # nothing is known of the run
        found = EngineSettings(
            batch=1, largest_batch=1, prompt=128, max_length=min(context or LONGEST_CACHE, LONGEST_CACHE)
        )
    longest = min(found.max_length, context) if context else found.max_length
    return found.model_copy(update={"max_length": longest, "prompt": min(found.prompt, longest)})
