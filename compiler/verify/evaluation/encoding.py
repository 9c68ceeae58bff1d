"""Texts as the tokens that an encoder reads, special ones included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.execution.token_windows import load_tokenizer
from compile_sparse.compiler.verify.evaluation.lines import Line
from compile_sparse.compiler.verify.evaluation.models import Encoded

__all__ = ["TextEncoder"]

_SPECIAL = ("cls_token_id", "sep_token_id", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


class TextEncoder:
    """Encodes lines as the model's own tokenizer does for a single call, cut to ``length`` tokens.

    Args:
        folder: with ``tokenizer.json``; without one only token ids can be read.
        config: the model's config as plain data.
        length: longest input, special tokens included.
    """

    def __init__(self, folder: Path | None, config: Mapping[str, Any], length: int) -> None:
        self._length, self._vocabulary = length, int(config.get("vocab_size") or 0)
        self._special = {config.get(name) for name in _SPECIAL} - {None}
        self._tokenizer = load_tokenizer(folder)  # our own: its settings are changed
        if self._tokenizer is not None:
            self._tokenizer.enable_truncation(length)
        self._mask = self._find_mask(folder, config)

    def of_line(self, line: Line) -> Encoded:
        """The line's text, or its text and text pair together, or its words."""
        if line.first and isinstance(line.first, tuple) and isinstance(line.first[0], int):
            return self._of_ids(line)
        given = list(line.first) if isinstance(line.first, tuple) else line.first
        found = self._encode(line.where, given, line.second, words=isinstance(given, list))
        return Encoded(
            tuple(found.ids),
            tuple(found.type_ids),
            tuple(each == 1 for each in found.special_tokens_mask),
            tuple(found.word_ids) if isinstance(given, list) else (),
        )

    def of_text(self, line: Line, text: str) -> Encoded:
        """One text of the line on its own."""
        return self.of_line(Line(line.where, "text", text))

    def windows(self, line: Line) -> Iterator[Encoded]:
        """The whole text of a line in pieces, each with special tokens around it as a text of its own has."""
        if not isinstance(line.first, str):
            yield self.of_line(line)
            return
        frame = self.of_text(line, "a")
        inner = [place for place, special in enumerate(frame.special) if not special]
        head, tail = (frame.ids[: inner[0]], frame.ids[inner[-1] + 1 :]) if inner else ((), ())
        tokenizer = self._needed(line.where)
        tokenizer.no_truncation()
        ids = tokenizer.encode(line.first, add_special_tokens=False).ids
        tokenizer.enable_truncation(self._length)
        step = max(1, self._length - len(head) - len(tail))
        for start in range(0, len(ids), step):
            piece = ids[start : start + step]
            if start and len(piece) < step // 4:
                continue  # a rest that says little
            special = (True,) * len(head) + (False,) * len(piece) + (True,) * len(tail)
            whole = (*head, *piece, *tail)
            yield Encoded(whole, (0,) * len(whole), special)

    def mask(self, where: str) -> int:
        """Id of the token that hides another one.

        Raises:
            UsageError: CS1057 when nothing says which one it is.
        """
        if self._mask is None:
            raise UsageError(
                "CS1057",
                "The model's mask token is not known.",
                where=where,
                why="Neither tokenizer_config.json nor special_tokens_map.json nor the config names one of its vocabulary.",
                hint="Restore the tokenizer's files, or set mask_token_id in config.json.",
            )
        return self._mask

    def _find_mask(self, folder: Path | None, config: Mapping[str, Any]) -> int | None:
        named = config.get("mask_token_id")
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if self._tokenizer is None or folder is None or isinstance(named, int):
                break
            said = _object(folder / name).get("mask_token")
            token = said.get("content") if isinstance(said, dict) else said
            named = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
        return named if isinstance(named, int) and 0 <= named < self._vocabulary else None

    def _needed(self, where: str) -> Any:
        if self._tokenizer is None:
            raise UsageError(
                "CS1035",
                "This model has no tokenizer, so text cannot be read.",
                where=where,
                why="The model folder has no tokenizer.json.",
                hint='Give token ids: {"input_ids": [...]} per line.',
            )
        return self._tokenizer

    def _encode(self, where: str, first: Any, second: str | None, *, words: bool) -> Any:
        found = self._needed(where).encode(first, second, is_pretokenized=words)
        if not found.ids:
            raise _unusable(where, "Its text gives no token.")
        self._check(where, found.ids)
        return found

    def _of_ids(self, line: Line) -> Encoded:
        ids = tuple(int(each) for each in line.first)
        self._check(line.where, ids)
        if len(ids) > self._length:
            raise _unusable(line.where, f"It has {len(ids)} tokens, the longest input is {self._length}.")
        return Encoded(ids, (0,) * len(ids), tuple(each in self._special for each in ids))

    def _check(self, where: str, ids: Any) -> None:
        outside = [each for each in ids if not 0 <= each < self._vocabulary]
        if outside:
            raise _unusable(
                where, f"Token id {outside[0]} is outside the vocabulary; the model has {self._vocabulary}."
            )


def _unusable(where: str, why: str) -> UsageError:
    return UsageError("CS1031", "A line cannot be read by this model.", where=where, why=why)


def _object(path: Path) -> Mapping[str, Any]:
    import json

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
