"""Write a program as a folder that ``from_pretrained`` loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from compile_sparse.backends.checkpoint.architecture import Architecture, architecture_of
from compile_sparse.backends.checkpoint.disk_form import on_disk
from compile_sparse.backends.checkpoint.per_layer import per_layer_shape_solutions, solve_per_layer
from compile_sparse.backends.checkpoint.shards import SHARD_BYTES, write_shards
from compile_sparse.backends.checkpoint.solver import Attempt, Solution, shape_solutions, solve
from compile_sparse.backends.checkpoint.tensors import Tensors, read_tensors
from compile_sparse.compiler.capture.side_files import write_side_files
from compile_sparse.compiler.capture.skeleton import quiet_transformers
from compile_sparse.compiler.errors import Refusal
from compile_sparse.compiler.files.digests import digest_file
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.ir.storage import commonest_type, stored_form
from compile_sparse.compiler.ir.weights import TensorSource
from compile_sparse.compiler.progress import Progress

__all__ = ["Checkpoint", "plan_checkpoint", "write_checkpoint"]

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """What was written.

    Attributes:
        files: name -> SHA-256.
        changes: config fields that differ from the model's, as ``"text_config.hidden_size" -> value``.
        per_layer: overrides by layer.
        unused: tensors of the class that its outputs do not depend on and the program does not hold; the class initialises
            them.
    """

    files: Mapping[str, str]
    changes: Mapping[str, Any]
    per_layer: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


def write_checkpoint(
    program: Program,
    out: Path,
    progress: Progress,
    *,
    per_layer: bool = False,
    shard_bytes: int = SHARD_BYTES,
    encode: Callable[[str, TensorSource], Mapping[str, TensorSource]] | None = None,
    beside: Callable[[Tensors], Mapping[str, TensorSource]] | None = None,
    dtype: torch.dtype | None = None,
) -> Checkpoint:
    """Write config, weights and the source's tokenizer files into the empty folder ``out``.

    Args:
        program: unquantized; zeros of masks are stored as they are.
        out: where to.
        progress: where tensors are reported.
        per_layer: describe layers that differ by ``per_layer_config``, for runtimes that read it; transformers does not.
        shard_bytes: largest weight file.
        encode: what stands for a tensor in the file (name, tensor -> tensors by name), for quantized and other formats.
        beside: further tensors by name in the file.
        dtype: what the config calls the model's type; by default the floating-point type of most elements.

    Raises:
        ModelError: CS2001 when the program was captured without weights.
        Refusal: CS4201 to CS4204; CS4205 when no config of the class describes the program; CS4206 when its layers differ.
    """
    architecture, tensors = _opened(program)
    attempt = Attempt()
    with progress.task("solve config", total=1) as task:
        solution = solve(program, architecture, tensors, attempt)
        if solution is None and per_layer:
            solution = solve_per_layer(program, architecture, tensors, attempt)
        task.advance()
    if solution is None:
        raise _refusal(architecture, tensors, attempt, differ=bool(tensors.uneven) and not per_layer)
    model = architecture.on_meta(architecture.parsed(solution.config))
    # Before the conversions of transformers, whose results no longer tell how their parts are stored.
    plain = on_disk(model, {name: stored_form(source) for name, source in tensors.sources.items()})
    stored = (
        {new: made for name, source in plain.items() for new, made in encode(name, source).items()} if encode else plain
    )
    stored |= beside(tensors) if beside else {}
    files = _write_config(architecture, solution, dtype or _commonest(tensors), out)
    with progress.task("write weights", total=len(stored)) as task:
        files |= write_shards(out, stored, shard_bytes=shard_bytes, on_tensor=task.advance)
    return Checkpoint(
        files={**files, **write_side_files(program, out)},
        changes={".".join(map(str, path)): value for path, value in solution.changes.items()},
        per_layer=solution.per_layer,
        unused=solution.verdict.unused if solution.verdict else (),
    )


def plan_checkpoint(program: Program, *, per_layer: bool = False) -> Solution:
    """The first config with the program's shapes. Reads no weights, so the gate is not asked.

    Args:
        program: unquantized.
        per_layer: whether layers may differ.

    Raises:
        Refusal: as ``write_checkpoint``.
    """
    architecture, tensors = _opened(program)
    attempt = Attempt()
    found = next(shape_solutions(program, architecture, tensors, attempt), None)
    if found is None and per_layer:
        found = next(per_layer_shape_solutions(program, architecture, tensors, attempt), None)
    if found is None:
        raise _refusal(architecture, tensors, attempt, differ=bool(tensors.uneven) and not per_layer)
    return found


def stored_names(program: Program) -> Mapping[str, str]:
    """Tensor of an unquantized program -> its name in the checkpoint, where removed blocks leave no gaps.

    Raises:
        Refusal: as ``write_checkpoint``.
    """
    return _opened(program)[1].renamed


def _opened(program: Program) -> tuple[Architecture, Tensors]:
    architecture = architecture_of(program.config)
    return architecture, read_tensors(program, architecture.shapes(architecture.parsed(architecture.config)))


def _refusal(architecture: Architecture, tensors: Tensors, attempt: Attempt, *, differ: bool) -> Refusal:
    name = architecture.model_class.__name__
    if differ:
        return Refusal(
            "CS4206",
            "A plain Hugging Face folder has layers of one size.",
            where=tensors.uneven[0],
            why=f"transformers builds every layer of {name} from the same config, and in this program "
            f"{len(tensors.uneven)} kinds of tensors differ between layers.",
            hint="Use --allocation uniform and remove whole layers only, or compile for ort-cpu, which takes any shape.",
        )
    sizes = ", ".join(f"{old} to {new}" for old, new in sorted(tensors.resized)) or "none"
    if attempt.rejected:
        nearest, verdict = min(attempt.rejected, key=lambda pair: pair[1].difference)
        fields = (
            ", ".join(f"{'.'.join(map(str, path))}={value}" for path, value in nearest.changes.items())
            or "the config as it is"
        )
        why = f"With {fields} every tensor has its shape, but " + (
            f"the class does not run: {verdict.raised}"
            if verdict.raised
            else f"outputs differ by {verdict.difference:.1%} of their largest value: the class computes a number from the "
            "size that changed (a scale, frequencies, heads per width)."
        )
    elif attempt.invalid:
        said = attempt.invalid[0].strip().splitlines()[-1].strip() if attempt.invalid[0].strip() else "no reason given"
        why = f"The sizes that fit (changed: {sizes}) are rejected by the class itself: {said}"
    else:
        why = f"No config of {name} gives its tensors these shapes (sizes changed: {sizes})."
    return Refusal(
        "CS4205",
        f"{name} cannot express this program.",
        where=CONFIG_FILE,
        why=why,
        hint="Compile for ort-cpu, which takes any shape, or prune other kinds.",
    )


def _commonest(tensors: Tensors) -> torch.dtype:
    sizes = ((stored_form(source).dtype, prod(source.shape)) for source in tensors.sources.values())
    return commonest_type(sizes) or torch.float32


def _write_config(architecture: Architecture, solution: Solution, dtype: torch.dtype, out: Path) -> dict[str, str]:
    config = architecture.parsed(_typed(dict(solution.config), str(dtype).removeprefix("torch.")))
    config.architectures = [architecture.model_class.__name__]
    with quiet_transformers():
        if solution.per_layer:
            config.per_layer_config = {number: dict(own) for number, own in solution.per_layer.items()}
            # Code that reads a global value of a field that varies would fail otherwise, loaders of tokenizers included.
            config.allow_global_per_layer_attribute_access = True
        config.save_pretrained(out)
    return {CONFIG_FILE: digest_file(out / CONFIG_FILE)[0]}


def _typed(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The type of the weights, in the config and its parts."""
    parts = {
        k: _typed(v, dtype) for k, v in config.items() if isinstance(v, dict) and k.endswith("_config") and "dtype" in v
    }
    return {**config, **parts, "dtype": dtype}
