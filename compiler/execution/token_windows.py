"""Text or token files to windows of token ids.

A file has one JSON object per line: ``{"text": ...}`` or ``{"input_ids": [...]}``. Each line is cut into windows of at most
``length`` tokens; windows never cross lines, and a last piece shorter than a quarter window is dropped. Windows of text begin as
the tokenizer begins a text; what it appends at the end of one is left out, because a window is a piece of a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.files.inside import require_inside

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["cut_windows", "load_tokenizer", "own_beginning", "read_windows"]

MIN_TOKENS = 2  # one to condition on, one to predict
_SHORT_TEXTS = ("a", "1", ".", "the")


def load_tokenizer(folder: Path | None) -> Tokenizer | None:
    """The folder's fast tokenizer, or None when it has none.

    Raises:
        UsageError: CS1034 when tokenizer.json is damaged.
        ModelError: CS2010 when it is a link that leads out of the folder.
    """
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    from tokenizers import Tokenizer

    file = require_inside(folder, folder / "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust extension raises bare Exception
        raise UsageError(
            "CS1034", "The tokenizer cannot be read.", where="tokenizer.json", why=str(error), hint="Restore the file."
        ) from error
    # Some files say how batches were padded and cut when the model was trained; texts here are read whole.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def own_beginning(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that the tokenizer itself puts before a text: what its post-processor says, whatever a config calls the beginning.

    transformers asks nothing else either (5.19: with a tokenizer.json, ``add_bos_token`` of tokenizer_config.json is ignored).
    """
    for text in _SHORT_TEXTS:
        inner, whole = (tokenizer.encode(text, add_special_tokens=special).ids for special in (False, True))
        starts = range(len(whole) - len(inner) + 1)
        place = next((start for start in starts if whole[start : start + len(inner)] == inner), None)
        if inner and place is not None:
            return tuple(whole[:place])
    return ()


def read_windows(
    path: Path,
    *,
    samples: int,
    length: int,
    vocabulary: int,
    context: int,
    tokenizer: Tokenizer | None,
    beginning: Sequence[int] = (),
) -> list[list[int]]:
    """At most ``samples`` windows of at most ``length`` token ids, spread evenly over the file.

    Args:
        path: JSONL file.
        samples: windows wanted.
        length: tokens per window.
        vocabulary: ids must be below this.
        context: longest sequence the model allows.
        tokenizer: for lines with text.
        beginning: ids put before every window cut from text.

    Raises:
        UsageError: CS1031 unreadable or malformed; CS1032 empty; CS1035 text without a tokenizer; CS1036 longer than the model
            allows, or too short for what stands before every window.
    """
    if length > context:
        raise UsageError(
            "CS1036",
            f"Sequences of {length} tokens are longer than the model allows.",
            where="--sequence-length",
            why=f"The model's longest sequence is {context} tokens.",
            hint=f"Use --sequence-length {context} or less.",
        )
    if len(beginning) >= length:
        raise UsageError(
            "CS1036",
            f"Sequences of {length} tokens have no room for text.",
            where="--sequence-length",
            why=f"{len(beginning)} tokens of the tokenizer's own stand before every text.",
            hint=f"Use --sequence-length {len(beginning) + MIN_TOKENS} or more.",
        )
    windows: list[list[int]] = []
    for where, ids, from_text in _sequences(path, tokenizer):
        head = beginning if from_text else ()
        outside = [i for i in (*head, *ids) if not 0 <= i < vocabulary]
        if outside:
            raise UsageError(
                "CS1031",
                f"A token id is outside the vocabulary: {outside[0]}.",
                where=where,
                why=f"The model has ids 0 to {vocabulary - 1}.",
                hint="Make the file with this model's tokenizer.",
            )
        windows += cut_windows(ids, length, head)
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


def cut_windows(ids: list[int], length: int, beginning: Sequence[int]) -> Iterator[list[int]]:
    """Windows of at most ``length`` of ``ids``, each after ``beginning``, which is shorter."""
    head = list(beginning)
    if ids[: len(head)] == head:
        ids = ids[len(head) :]
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
