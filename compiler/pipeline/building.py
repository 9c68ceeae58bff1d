"""How an artifact is built: the part of a recipe that concerns runtimes which build engines, and what else is written."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.targets.target import Build, Precision, Target, find_target, split_over, with_precision
from compile_sparse.compiler.targets.workload import Workload

__all__ = ["ENGINES", "LONGEST_CACHE", "Building", "allow_foreign_engines", "baseline_target", "chosen_target"]

LONGEST_CACHE = 4096
"""Tokens a cache of static length holds when nothing else is said: its buffers are allocated whole."""
ENGINES = ".engine"
"""Suffix of engine files."""


class Building(BaseModel):
    """Options of the artifact itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Precision | None = Field(
        default=None, description="of what is not quantized, in the baseline too; null: the target's own"
    )
    max_length: int | None = Field(
        default=None,
        ge=2,
        le=10_000_000,
        description="prompt and output tokens that fit the key-value cache, 2 to 10,000,000, where its length is static; "
        "null: the model's longest, up to 4,096",
    )
    engine: Literal["auto", "none", "rtx-aot"] | None = Field(
        default=None,
        description="auto: an engine where the target's GPU is at hand, elsewhere a check that the graph builds; none: the graph "
        "only; rtx-aot: a TensorRT-RTX engine, built without a GPU",
    )
    emit: tuple[str, ...] = Field(default=(), description="forms written beside the artifact's own, such as triton")


def chosen_target(
    name: str,
    building: Building,
    workload: Workload,
    *,
    context: int | None,
    longest_window: int = 0,
    causal: bool = True,
) -> Target:
    """The target called ``name`` with everything that options say about it.

    Args:
        name: of a target.
        building: options.
        workload: what engines are built for.
        context: the model's longest sequence in tokens, where it has one.
        longest_window: tokens of the longest text the artifact is checked on.
        causal: whether the model generates, and so has a cache.

    Raises:
        UsageError: CS1001 no such target, CS1042 no GPUs to split over, CS1043 a precision the target does not have, CS1046 an
            option without meaning on the target, CS1047 a cache shorter than the workload.
    """
    target = with_precision(split_over(find_target(name), workload.tensor_parallel), building.precision)
    if not target.builds_engines:
        for option, value in (("--engine", building.engine), ("--max-length", building.max_length)):
            if value is not None:
                raise _without_meaning(option, target)
        return target
    if workload.tensor_parallel > 1:
        raise UsageError(
            "CS1046",
            f"{target.name} builds for one GPU.",
            where=f"--tensor-parallel {workload.tensor_parallel}",
            why="Its graph and engines are not split.",
            hint="Leave the option out, or choose a vllm target.",
        )
    wanted = workload.prompt + workload.output if causal else 1
    _require_length(building.max_length, context, causal=causal)
    length = building.max_length or max(min(LONGEST_CACHE, context or LONGEST_CACHE), wanted, longest_window)
    if length < wanted:
        raise UsageError(
            "CS1047",
            "The requests do not fit the key-value cache.",
            where=f"--max-length {length}",
            why=f"The workload has {workload.prompt} prompt and {workload.output} output tokens.",
            hint=f"Give --max-length {wanted} or more, or a shorter --workload.",
        )
    build = Build(
        batch=workload.levels[0],
        largest_batch=max(8, *workload.levels),
        prompt=workload.prompt,
        max_length=min(length, context) if context else length,
        engine=building.engine or "auto",
    )
    return target.model_copy(update={"build": build})


def baseline_target(target: Target, *, runs_here: bool) -> Target:
    """``target`` for its dense baseline: nothing beside what is measured, and an engine only where one can be measured."""
    if target.build is None:
        return target
    build = target.build.model_copy(update={"engine": "auto" if runs_here else "none", "checkpoint": False})
    return target.model_copy(update={"build": build})


def allow_foreign_engines(target: Target) -> Target:
    """``target`` with engines that are not ours allowed.

    Raises:
        UsageError: CS1046 on a target without engines.
    """
    if target.build is None:
        raise _without_meaning("--allow-foreign-engine", target)
    return target.model_copy(update={"build": target.build.model_copy(update={"allow_foreign_engine": True})})


def _without_meaning(option: str, target: Target) -> UsageError:
    return UsageError(
        "CS1046",
        f"{option} means nothing on {target.name}.",
        where=option,
        why="Its runtime builds no engines and grows its key-value cache as needed.",
        hint="Leave the option out, or choose a TensorRT target.",
    )


def _require_length(length: int | None, context: int | None, *, causal: bool) -> None:
    if length is not None and not causal:
        raise UsageError(
            "CS1046",
            "--max-length means nothing for this model.",
            where=f"--max-length {length}",
            why="It is the length of a key-value cache, and the model has none.",
            hint="Leave the option out.",
        )
    if length is not None and context is not None and length > context:
        raise UsageError(
            "CS1047",
            "The key-value cache would be longer than the model allows.",
            where=f"--max-length {length}",
            why=f"The model's longest sequence is {context:,} tokens.",
            hint=f"Give --max-length {context} or less.",
        )
