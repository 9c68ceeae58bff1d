"""What TensorRT's builder says about sparsity in its log: which layers were eligible, and which got a sparse kernel.

Two wordings are known. From about 8.6 on::

    (Sparsity) Found 2 layer(s) eligible to use sparse tactics: a, b
    (Sparsity) Chose 1 layer(s) using sparse tactics: a

and before::

    (Sparsity) Layers eligible for sparse math: a, b
    (Sparsity) TRT inference plan picked sparse implementation for layers: a

A pair is printed for each selection of kernels, so the last one counts. Names are TensorRT's names of layers; fused ones
join the names of ONNX nodes (see ``layer_names``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from compile_sparse.backends.tensorrt.sparsity.layer_names import profile_of, split_list

__all__ = ["LayerList", "Selection", "memory_lines", "selections", "selections_by_profile"]

_NEW = r"(?:Found|Chose)\s+(?P<count>\d+)\s+layer\(s\)\s+(?:eligible to use|using) sparse tactics"
_OLD = r"Layers eligible for sparse math|TRT inference plan picked sparse implementation for layers"
_STATEMENT = re.compile(rf"\(Sparsity\)\s+(?P<what>{_NEW}|{_OLD})\s*:?(?P<rest>.*)")
_ELIGIBLE = re.compile(r"eligible")
# Time stamps, severities and sources that trtexec, Polygraphy and TensorRT's own loggers print in front of a message.
_PREFIX = re.compile(r"\s*(?:\[[^\]]*\]\s*)+|\s*\[TensorRT\]\s*\w+:\s*")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# TensorRT writes 'insuficient' in some versions.
_MEMORY = re.compile(
    r"skipping tactic.*memory|insuff?icient (?:device )?memory|memory is insuff?icient|ran out of (?:scratch )?memory"
    r"|out of memory",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class LayerList:
    """Layers that one line of the log is about.

    Attributes:
        count: how many, as the line says, or as many as it names.
        names: their names; None when the line counts but does not name them.
    """

    count: int
    names: tuple[str, ...] | None


@dataclass(frozen=True)
class Selection:
    """One selection of kernels. A part is None when the log lacks its line."""

    eligible: LayerList | None
    chosen: LayerList | None


def selections(messages: Iterable[str]) -> list[Selection]:
    """Every selection of kernels that the log tells of, in order.

    Args:
        messages: what the builder logged, one string per message; or the text of a log file as one string, whose lines may
            carry prefixes and may have been wrapped. A wrapped line must not be handed over in pieces: a message that has no
            prefix cannot be told from the rest of one.

    Returns:
        A pair of lines each. A line of which the other half is missing makes a selection of its own.
    """
    found: list[Selection] = []
    for message in messages:
        for eligible, layers in _statements(_COLOUR.sub("", message).splitlines()):
            if eligible:
                found.append(Selection(layers, None))
            elif found and found[-1].chosen is None:
                found[-1] = replace(found[-1], chosen=layers)
            else:
                found.append(Selection(None, layers))
    return found


def selections_by_profile(found: Sequence[Selection], profiles: int) -> list[Selection | None]:
    """The selection that holds for each optimization profile, in order; None where the log has none.

    The last complete pair counts. When layers carry TensorRT's suffix ``[profile N]``, they are sorted by it. Otherwise, with
    at least as many pairs as profiles, the last ones are taken to belong to the profiles in order, and with fewer the last one
    is taken for all. That order has not been checked on a build with several profiles: no such log was at hand.
    """
    complete = [selection for selection in found if selection.eligible and selection.chosen]
    if not complete:
        return [None] * profiles
    if any(profile_of(name) for selection in complete for name in _all_names(selection)):
        return [_of_profile(complete, profile) for profile in range(profiles)]
    last: list[Selection | None] = list(complete[-profiles:])
    return last if len(last) == profiles else [complete[-1]] * profiles


def memory_lines(messages: Iterable[str]) -> int:
    """How many lines say that kernels were left out because memory was short."""
    return sum(bool(_MEMORY.search(line)) for message in messages for line in message.splitlines())


def _statements(lines: Sequence[str]) -> Iterable[tuple[bool, LayerList]]:
    """(whether it is about eligible layers, the layers) for every line about sparsity."""
    for index, line in enumerate(lines):
        match = _STATEMENT.search(line)
        if match is None:
            continue
        prefixed = bool(line[: match.start()].strip())
        count = None if match["count"] is None else int(match["count"])
        tail = _wrapped_tail(lines[index + 1 :], match["rest"], prefixed, counted=count is not None)
        yield bool(_ELIGIBLE.search(match["what"])), _layers(match["rest"], tail, count)


def _wrapped_tail(following: Sequence[str], text: str, prefixed: bool, counted: bool) -> list[str]:
    """Lines that look like the rest of a wrapped one.

    After a line with a prefix those are all lines without one; after a line without, only those that a separator calls for.
    A line that counts its layers says itself how much is its own.
    """
    tail: list[str] = []
    for line in following:
        foreign = not line.strip() or "(Sparsity)" in line or line.lstrip().startswith(("&&&&", "```"))
        called_for = counted or text.rstrip().endswith((",", "+")) or (prefixed and bool(text.strip()))
        if foreign or _PREFIX.match(line) or not called_for:
            break
        tail.append(line)
        text = line
    return tail


def _layers(first: str, tail: Sequence[str], count: int | None) -> LayerList:
    if count is None:
        names = split_list("".join([first, *tail]))
        return LayerList(len(names), names)
    # The count says how much of what follows belongs to the list, and whether a name was cut in two or between two names.
    for lines in range(len(tail) + 1):
        for glue in ("", ", "):
            names = split_list(glue.join([first, *tail[:lines]]))
            if len(names) == count:
                return LayerList(count, names)
    names = split_list(first)
    return LayerList(count, names or None)


def _all_names(selection: Selection) -> tuple[str, ...]:
    lists = (selection.eligible, selection.chosen)
    return tuple(name for layers in lists if layers and layers.names for name in layers.names)


def _of_profile(complete: Sequence[Selection], profile: int) -> Selection | None:
    for selection in reversed(complete):
        if any((profile_of(name) or 0) == profile for name in _all_names(selection)):
            return Selection(_only(selection.eligible, profile), _only(selection.chosen, profile))
    return None


def _only(layers: LayerList | None, profile: int) -> LayerList | None:
    if layers is None or layers.names is None:
        return layers
    names = tuple(name for name in layers.names if (profile_of(name) or 0) == profile)
    return LayerList(len(names), names)
