"""The data files of a recipe, and the packaged text, as windows of a model's token ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compile_sparse.compiler.capture.generation import generation_defaults
from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.execution.calibration import CalibrationStream
from compile_sparse.compiler.execution.calibration_arrays import read_arrays
from compile_sparse.compiler.execution.sample_text import SAMPLE_TEXT
from compile_sparse.compiler.execution.token_windows import cut_windows, load_tokenizer, own_beginning, read_windows
from compile_sparse.compiler.ir.model_facts import context_length
from compile_sparse.compiler.recipes.recipe import Beginning, Recipe

__all__ = ["DEFAULT_WINDOW_TOKENS", "SAMPLE_TOKENS", "TextReader"]

DEFAULT_WINDOW_TOKENS = 256
SAMPLE_TOKENS = 64
_UNLIMITED = 1 << 30
_DEFAULT_WINDOWS = 64


class TextReader:
    """Reads data files of a recipe as windows of a model's token ids.

    Args:
        config: the model's config as plain data.
        folder: where tokenizer files are, or None.
        bos: whether windows of text begin with the beginning-of-sequence token, see ``Recipe.bos``.

    Raises:
        UsageError: CS1063 when they should and nothing names that token; CS1034.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path | None, bos: Beginning = "tokenizer") -> None:
        self._context = context_length(config) or _UNLIMITED
        self._vocabulary = int(config.get("vocab_size") or 0)
        self._tokenizer = load_tokenizer(folder)
        self._beginning: tuple[int, ...] = ()
        if self._tokenizer is not None and bos != "never":
            self._beginning = own_beginning(self._tokenizer)
            if bos == "always" and not self._beginning:
                self._beginning = _named_beginning(folder, config)

    def _read(self, file: str, samples: int, length: int | None) -> list[list[int]]:
        if not self._vocabulary:
            raise UsageError(
                "CS1038",
                "This model does not read text.",
                where=Path(file).name,
                why="It has no vocabulary.",
                hint="Leave evaluation files out; agreement with the dense model is measured instead.",
            )
        return read_windows(
            Path(file),
            samples=samples,
            length=length or min(DEFAULT_WINDOW_TOKENS, self._context),
            vocabulary=self._vocabulary,
            context=self._context,
            tokenizer=self._tokenizer,
            beginning=self._beginning,
        )

    def calibration(self, recipe: Recipe) -> CalibrationStream | None:
        """Windows the passes observe, or None when the recipe has no calibration file."""
        wanted = recipe.calibration
        if wanted is None:
            return None
        if not self._vocabulary or wanted.file.endswith(".npz"):
            return CalibrationStream((), arrays=read_arrays(Path(wanted.file), wanted.samples))
        windows = self._read(wanted.file, wanted.samples, wanted.sequence_length)
        return CalibrationStream(tuple(tuple(w) for w in windows))

    def slices(self, recipe: Recipe) -> dict[str, list[list[int]]]:
        """Evaluation windows by slice name."""
        wanted = recipe.evaluation
        samples = wanted.samples or _DEFAULT_WINDOWS
        return {name: self._read(file, samples, wanted.sequence_length) for name, file in wanted.slices.items()}

    def sample(self) -> list[list[int]]:
        """Windows of the packaged text; none for a model without a tokenizer, or one whose tokenizer does not fit."""
        if self._tokenizer is None or not self._vocabulary:
            return []
        length = min(SAMPLE_TOKENS, self._context)
        if len(self._beginning) >= length:
            return []
        encoded = [self._tokenizer.encode(text, add_special_tokens=False).ids for text in SAMPLE_TEXT]
        windows = [window for ids in encoded for window in cut_windows(ids, length, self._beginning)]
        return [window for window in windows if len(window) == length and max(window) < self._vocabulary]


def _named_beginning(folder: Path | None, config: Mapping[str, Any]) -> tuple[int, ...]:
    found = generation_defaults(folder, config).ids("bos_token_id")
    if not found:
        raise UsageError(
            "CS1063",
            "The model has no beginning-of-sequence token.",
            where="--bos always",
            why="Neither generation_config.json nor config.json names one (bos_token_id), and the tokenizer adds none.",
            hint="Leave the option out, or name the token in config.json.",
        )
    return found[:1]
