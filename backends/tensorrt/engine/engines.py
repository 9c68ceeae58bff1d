"""Which engines are loaded, and why another is not.

An engine is a program: the runtime trusts what it deserializes. Only those are loaded whose digest stands in a description of
ours, unless the user vouches for one. The rest are rules of the vendor that its own error messages do not explain: an engine
belongs to one version of the library and to one kind of GPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compile_sparse.backends.tensorrt.description import Description, EngineRecord
from compile_sparse.compiler.errors import EnvironmentFailure, Refusal
from compile_sparse.compiler.files.digests import digest_file

__all__ = ["Here", "check_engine", "choose_engine"]

_FOREIGN_HINT = "If you trust it, give --allow-foreign-engine."


@dataclass(frozen=True)
class Here:
    """The machine that an engine would run on.

    Attributes:
        versions: installed runtimes by builder name, such as ``{"tensorrt": "11.4.0"}``.
        gpu: name of the GPU as its driver tells it; empty without one.
        compute_capability: such as '8.0'; empty without a GPU.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    gpu: str = ""
    compute_capability: str = ""


def choose_engine(description: Description, here: Here) -> EngineRecord:
    """The first listed engine that fits ``here``; one of TensorRT, whose kernels were timed, before one of TensorRT-RTX.

    Raises:
        Refusal: CS4424 when there is none; CS4422 or CS4423 when none fits.
    """
    records = sorted(description.engines, key=lambda record: record.builder != "tensorrt")
    problems: list[Refusal | EnvironmentFailure] = []
    for record in records:
        try:
            _check_place(record, here)
        except (Refusal, EnvironmentFailure) as error:
            problems.append(error)
        else:
            return record
    if not problems:
        raise Refusal(
            "CS4424",
            "The artifact has no engine.",
            where="compile_sparse.json",
            why="It was compiled where none could be built for its target.",
            hint="Compile again on the target's GPU, or with --engine rtx-aot.",
        )
    if len(problems) == 1:
        raise problems[0]
    first = problems[0]
    why = " ".join(f"{problem.where}: {problem.why}" for problem in problems)
    raise type(first)(
        first.code, "None of the artifact's engines runs here.", where="engines", why=why, hint=first.hint
    )


def check_engine(folder: Path, record: EngineRecord, here: Here, *, allow_foreign: bool = False) -> str:
    """Check that the engine of ``record`` in ``folder`` is the one that was built and runs ``here``.

    Reads the whole file.

    Args:
        folder: the model's.
        record: from its description.
        here: the machine.
        allow_foreign: load it although it is not what was recorded. The rules of version and GPU still hold.

    Returns:
        A sentence when ``allow_foreign`` was needed, else an empty string.

    Raises:
        Refusal: CS4420 it was changed or cut short; CS4422 another GPU; CS4423 another version; CS4425 it is not there.
        EnvironmentFailure: CS5210 its runtime is not installed.
    """
    _check_place(record, here)
    path = folder / record.file
    if not path.is_file() or path.is_symlink():
        why = "It is a symbolic link." if path.is_symlink() else "The file does not exist."
        raise Refusal("CS4425", "There is no such engine.", where=str(path), why=why, hint="Copy the whole artifact.")
    size = os.stat(path).st_size
    if size < record.bytes and not allow_foreign:
        raise Refusal(
            "CS4420",
            "The engine was cut short.",
            where=str(path),
            why=f"It has {size:,} bytes, recorded are {record.bytes:,}.",
            hint="Copy the artifact again, or compile again.",
        )
    if digest_file(path)[0] == record.sha256:
        return ""
    if allow_foreign:
        return f"{record.file} is not the engine that was recorded; it was loaded because the user vouches for it."
    raise Refusal(
        "CS4420",
        "The engine is not the one that was built.",
        where=str(path),
        why=f"Its sha256 differs from the recorded {record.sha256[:16]}... . A runtime runs what an engine contains.",
        hint=f"Copy the artifact again. {_FOREIGN_HINT}",
    )


def _check_place(record: EngineRecord, here: Here) -> None:
    """Whether runtime and GPU are those that the engine is for."""
    if record.builder not in here.versions:
        extra = "tensorrt" if record.builder == "tensorrt" else "tensorrt-rtx"
        found = ", ".join(f"{name} {version}" for name, version in here.versions.items()) or "none"
        raise EnvironmentFailure(
            "CS5210",
            f"The runtime of the engine, {record.builder}, is not installed.",
            where=record.file,
            why=f"Installed is {found}; engines of one are not loaded by the other.",
            hint=f"pip install 'compile-sparse[{extra}]'",
        )
    _check_version(record, here.versions[record.builder])
    if record.compute_capability != here.compute_capability:
        gpu = (
            f"the GPU here ({here.gpu}) has {here.compute_capability}" if here.compute_capability else "there is no GPU"
        )
        raise Refusal(
            "CS4422",
            "The engine is for another GPU.",
            where=record.file,
            why=f"It was built for compute capability {record.compute_capability}; {gpu}.",
            hint="Compile for a target with this GPU.",
        )
    if record.builder == "tensorrt" and record.gpu and record.gpu != here.gpu:
        raise Refusal(
            "CS4422",
            "The engine is for another GPU.",
            where=record.file,
            why=f"TensorRT chose its kernels on {record.gpu!r}; the GPU here is {here.gpu!r}.",
            hint="Compile again on this GPU.",
        )


def _check_version(record: EngineRecord, installed: str) -> None:
    """TensorRT loads plans of its own major and minor version; TensorRT-RTX those of its own release only."""
    numbers = 2 if record.builder == "tensorrt" else 3
    rule = "major and minor version must be equal" if record.builder == "tensorrt" else "releases must be equal"
    if _numbers(record.version, numbers) == _numbers(installed, numbers):
        return
    raise Refusal(
        "CS4423",
        "The engine is of another version.",
        where=record.file,
        why=f"It was built by {record.builder} {record.version}, here is {installed}; {rule}.",
        hint=f"Compile again, or install {record.builder} {record.version}.",
    )


def _numbers(version: str, count: int) -> Sequence[str]:
    return version.split("+")[0].split(".")[:count]
