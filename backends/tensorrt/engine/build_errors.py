"""What a builder reports, as our errors: the node, the module of the model it came from, and what to do.

====== ==========================================================
CS4400 the parser refuses a node
CS4401 the parser has no such operator
CS4402 a number format does not exist on the target's GPU
CS4403 a dimension varies and no profile says how
CS4404 attention has no kernel of its own here
CS4405 external weights are missing or too short
CS4406 the ONNX file itself is larger than its format allows
CS4407 the builder fails otherwise
CS4408 the file is no ONNX model
CS5003 the disk; CS5211 the builder does not load; CS5212 no memory
====== ==========================================================
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compile_sparse.backends.tensorrt.engine.build_messages import BuildReply, ParserError, ProfileProblem
from compile_sparse.compiler.errors import CompileSparseError, EnvironmentFailure, Refusal
from compile_sparse.compiler.files.durable import as_disk_failure

if TYPE_CHECKING:
    from compile_sparse.backends.tensorrt.engine.builder import BuildRequest

__all__ = ["before_parsing", "explain", "source_module"]

_LARGEST_PROTOBUF = 2**31 - 1
_WEIGHTS = re.compile(r"WeightsContext\.cpp:\d+: (.*)", re.DOTALL)
_FORMAT = re.compile(
    r"Cannot compile for target\(s\) (\S+), because the model contains HW-specific (?:datatypes|[^:]*): ([^\n]*?)\.(?: In |\s|$)"
)
_ATTENTION = re.compile(r"Attention operation was not supported by a dedicated kernel")
_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|insufficient memory", re.IGNORECASE)
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_FORMATS = {"fp8_e4m3": "FP8", "fp4_e2m1": "FP4 (NVFP4)", "bf16": "bfloat16", "int4": "INT4"}


def source_module(node: str) -> str:
    """The module of the model that an ONNX node came from: ``<module>/<operator>_<number>``; empty where none is known."""
    return node.rpartition("/")[0]


def before_parsing(onnx: Path) -> None:
    """What is seen without parsing.

    Raises:
        Refusal: CS4406 or CS4408.
    """
    if not onnx.is_file():
        raise Refusal("CS4408", "There is no ONNX model to build.", where=str(onnx), why="The file does not exist.")
    size = onnx.stat().st_size
    if size > _LARGEST_PROTOBUF:
        raise Refusal(
            "CS4406",
            "The ONNX file is too large for its format.",
            where=str(onnx),
            why=f"It has {size:,} bytes; a protobuf message may have {_LARGEST_PROTOBUF:,}.",
            hint="Keep the weights in an external file beside it, as compile-sparse writes them.",
        )
    if size == 0:  # the parser takes it for a model without nodes
        raise Refusal("CS4408", "The file is no ONNX model.", where=str(onnx), why="It is empty.")


def explain(reply: BuildReply, request: BuildRequest) -> CompileSparseError:
    """The error that a failed build's ``reply`` describes."""
    if reply.failure == "import":
        return EnvironmentFailure(
            "CS5211",
            f"The builder {request.builder} does not load.",
            where=request.builder,
            why=reply.why,
            hint="Install it again; its libraries must be of the same version as its Python module.",
        )
    if reply.failure == "disk":
        failure = as_disk_failure(OSError(reply.errno, reply.why, reply.file), request.onnx)
        return failure or EnvironmentFailure("CS5003", "A file cannot be written.", where=reply.file, why=reply.why)
    if reply.problem is not None:
        return _shape(reply.problem)
    return _parse(reply.errors, reply.log, request) if reply.failure == "parse" else _build(reply.log, request)


def _shape(problem: ProfileProblem) -> Refusal:
    return Refusal(
        "CS4403",
        "The builder does not know what shapes an input takes.",
        where=f"{problem.input} {problem.shape}",
        why=f"Profile {problem.profile!r}: {problem.why}."
        if problem.profile
        else "A dimension varies and there is no profile.",
        hint="Give every input with a dimension that varies its least, optimal and largest shape.",
    )


def _parse(errors: Sequence[ParserError], log: Sequence[str], request: BuildRequest) -> Refusal:
    for line in log:
        if match := _WEIGHTS.search(line):
            return Refusal(
                "CS4405",
                "The weights outside the ONNX file cannot be read.",
                where=str(request.onnx),
                why=match[1].strip(),
                hint="Copy the whole folder: the ONNX file and the data beside it belong together.",
            )
    first = errors[0] if errors else ParserError("unknown", "", "", "\n".join(log))
    if first.code == "MODEL_DESERIALIZE_FAILED":
        return Refusal(
            "CS4408",
            "The file is no ONNX model.",
            where=str(request.onnx),
            why=f"The parser says: {_plain(first.text)}",
            hint="Check whether the file was copied whole.",
        )
    others = [_place(error) for error in errors[1:]]
    why = f"The parser of {request.builder} says {first.code}: {_plain(first.text)}"
    if others:
        why += f" It also refuses {'; '.join(others[:5])}{' and more' if len(others) > 5 else ''}."
    if _unknown_operator(first):
        return Refusal(
            "CS4401",
            f"TensorRT has no operator {first.operator}.",
            where=_place(first),
            why=why,
            hint="Please report it with the model's config.json; ort-cpu may run it.",
        )
    return Refusal("CS4400", "TensorRT refuses a node of the graph.", where=_place(first), why=why)


def _unknown_operator(error: ParserError) -> bool:
    """An importer that refuses an operator whole states the bare condition 'false'."""
    return "Plugin not found" in error.text or (
        error.code == "UNSUPPORTED_NODE" and error.text.strip().lower() in ("", "false")
    )


def _place(error: ParserError) -> str:
    module = source_module(error.node)
    place = f"{error.operator or 'a node'} {error.node}".strip()
    return f"{place} (module {module})" if module else place


def _build(log: Sequence[str], request: BuildRequest) -> CompileSparseError:
    errors = [line[4:] for line in log if line.startswith(("[E]", "[F]"))]
    text = "\n".join(errors)
    where = ", ".join(dict.fromkeys(_ONNX_LAYER.findall(text))) or str(request.onnx)
    if match := _FORMAT.search(text):
        formats = ", ".join(_FORMATS.get(name.strip(), name.strip()) for name in match[2].split(","))
        return Refusal(
            "CS4402",
            f"A GPU of compute capability {request.compute_capability} does not have {formats}.",
            where=where,
            why=f"The builder says that {match[1]} cannot compute with {match[2]}.",
            hint="Quantize with a scheme of the target ('compile-sparse targets'), or choose a newer GPU's target.",
        )
    if _ATTENTION.search(text):
        return Refusal(
            "CS4404",
            "TensorRT has no attention kernel for these shapes and types.",
            where=where,
            why="The builder says that attention is not supported by a dedicated kernel, and may not be taken apart.",
            hint="Compile in fp16 or bf16; float32 attention needs the node attribute TRT_decomposable.",
        )
    if _MEMORY.search(text):
        return EnvironmentFailure(
            "CS5212",
            "The builder ran out of memory.",
            where=where,
            why=_plain(errors[-1]),
            hint="Use a shorter or smaller --workload, or free memory of the GPU.",
        )
    why = " ".join(_plain(line) for line in errors[-3:]) or "It gives no reason."
    return Refusal("CS4407", f"{request.builder} cannot build the graph.", where=where, why=why)


def _plain(text: str) -> str:
    """One line, without what the lack of a GPU's driver adds."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and "cudaError 35" not in line]
    return " ".join(lines)[:800]
