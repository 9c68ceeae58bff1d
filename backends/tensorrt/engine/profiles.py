"""Optimization profiles: the shapes kernels are chosen for, from the workload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compile_sparse.backends.onnx.graph_writer import ValueRecord
from compile_sparse.backends.tensorrt.description import Profile
from compile_sparse.backends.tensorrt.graph.cache import BATCH, SEQUENCE
from compile_sparse.backends.tensorrt.options import EngineSettings
from compile_sparse.compiler.errors import Refusal

__all__ = ["profiles_for"]

Range = tuple[int, int, int]


def profiles_for(inputs: Sequence[ValueRecord], build: EngineSettings, *, decoder: bool) -> tuple[Profile, ...]:
    """Prompts and single tokens are different regimes, so a decoder has one for each; kernels are timed at the middle shape.

    Raises:
        Refusal: CS4412, a dimension varies and nothing says in which range.
    """
    batch = (1, build.batch, max(build.batch, build.largest_batch))
    if not decoder:
        length = (1, min(build.prompt, build.max_length), build.max_length)
        return (_profile("samples", inputs, {"batch_size": batch, "sequence_length": length}),)
    prompt = (1, min(build.prompt, build.max_length), build.max_length)
    return (
        _profile("prefill", inputs, {BATCH: batch, SEQUENCE: prompt}),
        _profile("decode", inputs, {BATCH: batch, SEQUENCE: (1, 1, 1)}),
    )


def _profile(name: str, inputs: Sequence[ValueRecord], ranges: Mapping[str, Range]) -> Profile:
    shapes = {}
    for value in inputs:
        known = [(size, size, size) if isinstance(size, int) else ranges.get(size) for size in value.shape]
        if None in known:
            dimension = value.shape[known.index(None)]
            raise Refusal(
                "CS4412",
                "An input varies in a dimension that TensorRT needs a range for.",
                where=f"{value.name}: {dimension}",
                why="Profiles are made for the number of samples and the length of text only.",
                hint="Export the model with this dimension fixed.",
            )
        shapes[value.name] = tuple(tuple(each[index] for each in known if each) for index in range(3))
    return Profile(name=name, shapes=shapes)  # type: ignore[arg-type]
