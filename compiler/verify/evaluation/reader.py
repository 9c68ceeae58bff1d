"""From an evaluation file to what is measured on it, as far as the model has something to say to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compile_sparse.compiler.capture.samples import input_shape
from compile_sparse.compiler.capture.tasks import Task, task_of
from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.execution.calibration_arrays import read_arrays
from compile_sparse.compiler.ir.model_facts import context_length
from compile_sparse.compiler.verify.evaluation.arrays import LabelledArrays
from compile_sparse.compiler.verify.evaluation.classification import LabelledText
from compile_sparse.compiler.verify.evaluation.embeddings import Pairs, Sentences
from compile_sparse.compiler.verify.evaluation.encoding import TextEncoder
from compile_sparse.compiler.verify.evaluation.images import IMAGES, read_images
from compile_sparse.compiler.verify.evaluation.labels import Labels
from compile_sparse.compiler.verify.evaluation.lines import Kind, Line, read_lines, spread
from compile_sparse.compiler.verify.evaluation.masked import MaskedText
from compile_sparse.compiler.verify.evaluation.models import EvaluationSlice
from compile_sparse.compiler.verify.evaluation.outputs import TextOutputs
from compile_sparse.compiler.verify.evaluation.pooling import read_pooling

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["SAMPLES", "EvaluationReader"]

SAMPLES = 1000
"""Lines or samples of a file that are measured, where the recipe does not say."""
WINDOWS = 64
"""The same of windows of text that a language model is scored on."""
DEFAULT_TOKENS = 256
_TAKEN: Mapping[Task, tuple[Kind, ...]] = {
    "embedding": ("text", "pairs"),
    "masked-lm": ("text",),
    "sequence-classification": ("text", "labels"),
    "token-classification": ("text", "words"),
    "other": ("text",),
    "vision": (),
    "audio": (),
}
_NAMES: Mapping[Task, str] = {
    "embedding": "a text model without a head gives embeddings: it takes texts, and pairs of query and document",
    "masked-lm": "a masked language model takes texts",
    "sequence-classification": "a classifier of texts takes texts with labels, or without",
    "token-classification": "a classifier of words takes words with labels, or texts",
    "other": "it takes texts; agreement with the dense model is measured on them",
    "vision": "a model of images takes a folder of images, in folders by class, or an .npz of pixel_values and labels",
    "audio": "a model of audio features takes an .npz of input_features and labels",
}


class EvaluationReader:
    """Reads evaluation files for one model that does not generate.

    Args:
        folder: where tokenizer, pooling and preprocessing files are, or None.
        config: of the model.
        model_class: its class.
        length: tokens per input, or None: 256, or less where the model says so.
        image_size: height and width the model was captured for, where not the config's.
    """

    def __init__(
        self,
        folder: Path | None,
        config: PretrainedConfig,
        model_class: type,
        length: int | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        self.task = task_of(model_class)
        self._folder, self._config, self._class, self._length = folder, config, model_class, length
        self._image_size = image_size

    def read(self, path: Path, samples: int | None = None) -> EvaluationSlice:
        """What is measured on ``path``: JSON lines, an ``.npz``, or a folder of images.

        Raises:
            UsageError: CS1055 it holds nothing for this model; CS1031 to CS1036, CS1048 and CS1056 to CS1059 what is wrong.
        """
        if self.task in ("vision", "audio"):
            return self._arrays(path, samples)
        if path.is_dir() or path.suffix == ".npz":
            raise self._unfit(path.name, "It is no file of lines.")
        lines = read_lines(path)
        if lines[0].kind not in _TAKEN[self.task]:
            raise self._unfit(lines[0].where, f"Its lines have {lines[0].kind}.")
        if self.task == "masked-lm":
            return self._masked(lines, samples or WINDOWS)
        chosen = spread(lines, samples or SAMPLES)
        return self._embeddings(chosen) if self.task == "embedding" else self._classified(chosen)

    def _encoder(self, longest: int | None = None) -> TextEncoder:
        config = self._config.to_dict()
        context = context_length(config)
        if self._length is not None and context is not None and self._length > context:
            raise UsageError(
                "CS1036",
                f"Sequences of {self._length} tokens are longer than the model allows.",
                where="--sequence-length",
                why=f"The model's longest sequence is {context} tokens.",
                hint=f"Use --sequence-length {context} or less.",
            )
        length = self._length or min(each for each in (DEFAULT_TOKENS, context, longest) if each is not None)
        return TextEncoder(self._folder, config, length)

    def _embeddings(self, lines: list[Line]) -> EvaluationSlice:
        pooling = read_pooling(self._folder)
        encoder = self._encoder(pooling.max_tokens)
        if lines[0].kind == "text":
            return Sentences(tuple(map(encoder.of_line, lines)), pooling)
        queries = tuple(encoder.of_text(line, str(line.first)) for line in lines)
        documents = tuple(encoder.of_text(line, str(line.second)) for line in lines)
        return Pairs(queries, documents, pooling)

    def _masked(self, lines: list[Line], samples: int) -> EvaluationSlice:
        encoder = self._encoder()
        mask = encoder.mask(lines[0].where)
        texts = [text for line in lines for text in encoder.windows(line) if not all(text.special)]
        if not texts:
            raise self._unfit(lines[0].where, "None of its lines has a token that can be hidden.")
        return MaskedText(tuple(spread(texts, samples)), mask)

    def _classified(self, lines: list[Line]) -> EvaluationSlice:
        encoder, labels = self._encoder(), Labels(self._config)
        texts = tuple(map(encoder.of_line, lines))
        if self.task == "other":
            return TextOutputs(texts)
        if lines[0].kind == "text":
            return LabelledText(texts, None)
        if lines[0].kind == "words":
            return LabelledText(texts, tuple(labels.of_words(*each) for each in zip(lines, texts, strict=True)))
        return LabelledText(texts, labels.of_texts(lines))

    def _arrays(self, path: Path, samples: int | None) -> EvaluationSlice:
        name, shape = input_shape(self._class, self._config, self._image_size)
        labels: Any
        if path.is_dir() and self.task == "vision":
            class_of = Labels(self._config).of_name
            pixels, labels = read_images(path, self._folder, class_of, samples or IMAGES, self._image_size)
            arrays: dict[str, Any] = {name: pixels}
        elif path.suffix == ".npz":
            arrays = read_arrays(path, samples or SAMPLES)
            labels = arrays.pop("labels", None)
        else:
            raise self._unfit(path.name, "It is neither a folder nor an .npz.")
        given = arrays.get(name)
        if given is None or given.shape[1:] != shape or set(arrays) != {name}:
            has = ", ".join(f"{key} {list(array.shape)}" for key, array in arrays.items()) or "labels only"
            wanted = f"{name} [samples, {', '.join(map(str, shape))}]"
            size = " (--image-size chooses another)" if self.task == "vision" else ""
            raise self._unfit(
                path.name, f"It has {has}; the model takes {wanted}{size}, and labels may stand beside it."
            )
        if labels is not None:
            labels = self._classes(labels, path.name)
        return LabelledArrays({name: given.astype(np.float32)}, labels)

    def _classes(self, labels: Any, where: str) -> Any:
        if "Classification" not in self._class.__name__:
            raise self._unfit(where, "It has labels, and the model has no classes: leave the labels out.")
        count = int(self._config.num_labels)
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or not ((labels >= 0) & (labels < count)).all():
            raise self._unfit(where, f"Labels are whole numbers from 0 to {count - 1}, one per sample.")
        return labels.astype(np.int64)

    def _unfit(self, where: str, why: str) -> UsageError:
        return UsageError(
            "CS1055",
            "The evaluation file has nothing for this model.",
            where=where,
            why=f"{why} {self._class.__name__}: {_NAMES[self.task]}.",
        )
