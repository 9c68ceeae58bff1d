"""Text or token files to windows of token ids.

A file has one JSON object per line: ``{"text": ...}`` or ``{"input_ids": [...]}``. Each line is cut into windows of at most
``length`` tokens; windows never cross lines, and a last piece shorter than a quarter window is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compile_sparse.compiler.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["cut_windows", "load_tokenizer", "read_windows"]

MIN_TOKENS = 2  # one to condition on, one to predict


def load_tokenizer(folder: Path | None) -> Tokenizer | None:
    """The folder's fast tokenizer, or None when it has none.

    Raises:
        UsageError: CS1034 when tokenizer.json is damaged.
    """
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the Rust extension raises bare Exception
        raise UsageError(
            "CS1034", "The tokenizer cannot be read.", where="tokenizer.json", why=str(error), hint="Restore the file."
        ) from error
    # Some files say how batches were padded and cut when the model was trained; texts here are read whole.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def read_windows(
    path: Path,
    *,
    samples: int,
    length: int,
    vocabulary: int,
    context: int,
    tokenizer: Tokenizer | None,
    beginning: int | None = None,
) -> list[list[int]]:
    """At most ``samples`` windows of at most ``length`` token ids, spread evenly over the file.

    Args:
        path: JSONL file.
        samples: windows wanted.
        length: tokens per window.
        vocabulary: ids must be below this.
        context: longest sequence the model allows.
        tokenizer: for lines with text.
        beginning: id put before every window cut from text (the model's beginning-of-sequence token), or None.

    Raises:
        UsageError: CS1031 unreadable or malformed; CS1032 empty; CS1035 text without a tokenizer; CS1036 longer than the model.
    """
    if length > context:
        raise UsageError(
            "CS1036",
            f"Sequences of {length} tokens are longer than the model allows.",
            where="--sequence-length",
            why=f"The model's longest sequence is {context} tokens.",
            hint=f"Use --sequence-length {context} or less.",
        )
    windows: list[list[int]] = []
    for where, ids, from_text in _sequences(path, tokenizer):
        outside = [i for i in ids if not 0 <= i < vocabulary]
        if outside:
            raise UsageError(
                "CS1031",
                f"A token id is outside the vocabulary: {outside[0]}.",
                where=where,
                why=f"The model has ids 0 to {vocabulary - 1}.",
                hint="Make the file with this model's tokenizer.",
            )
        windows += cut_windows(ids, length, beginning if from_text else None)
    if not windows:
        raise UsageError(
            "CS1032",
            "The file holds no usable text.",
            where=path.name,
            why=f"No line gives {MIN_TOKENS} tokens or more.",
            hint='Give one {"text": "..."} or {"input_ids": [...]} object per line.',
        )
    if len(windows) <= samples:
        return windows
    # Evenly spaced and therefore the same on every machine, and not only the first document.
    return [windows[i * len(windows) // samples] for i in range(samples)]


def cut_windows(ids: list[int], length: int, beginning: int | None) -> Iterator[list[int]]:
    """Windows of at most ``length`` of ``ids``, each after ``beginning`` where there is one."""
    head = [] if beginning is None else [beginning]
    if beginning is not None and ids[:1] == head:
        ids = ids[1:]
    step = length - len(head)
    for start in range(0, len(ids), step):
        piece = head + ids[start : start + step]
        if len(piece) >= max(MIN_TOKENS, length // 4) or (start == 0 and len(piece) >= MIN_TOKENS):
            yield piece


def _sequences(path: Path, tokenizer: Tokenizer | None) -> Iterator[tuple[str, list[int], bool]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{path.name}, line {number}"
                    yield where, *_ids(line, where, tokenizer)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "CS1031", "The file cannot be read.", where=path.name, why=str(error), hint="Check the path; use UTF-8."
        ) from error


def _ids(line: str, where: str, tokenizer: Tokenizer | None) -> tuple[list[int], bool]:
    """Token ids of a line, and whether they come from text."""
    try:
        entry: Any = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(
            "CS1031",
            "A line is not JSON.",
            where=where,
            why=str(error),
            hint='Give one {"text": "..."} or {"input_ids": [...]} object per line.',
        ) from error
    ids = entry.get("input_ids") if isinstance(entry, dict) else None
    if isinstance(ids, list) and all(type(i) is int for i in ids):
        return list(ids), False
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise UsageError(
            "CS1031",
            "A line has neither text nor token ids.",
            where=where,
            why='Expected an object with "text" (string) or "input_ids" (integers).',
        )
    if tokenizer is None:
        raise UsageError(
            "CS1035",
            "This model has no tokenizer, so text cannot be read.",
            where=where,
            why="The model folder has no tokenizer.json.",
            hint='Give token ids: {"input_ids": [...]} per line.',
        )
    return list(tokenizer.encode(text, add_special_tokens=False).ids), True
