"""The files beside config and weights in a model folder: what each is for, and which artifacts get a copy of it.

This is the only list. What every backend copies, and what decides whether an earlier result may be used again, is read from it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from compile_sparse.compiler.files.digests import digest_file

__all__ = ["SIDE_FILES", "Layout", "SideFile", "copy_side_files", "find_side_files"]

Layout = Literal["huggingface", "genai"]
"""Kinds of artifact: a folder for ``from_pretrained`` (which serving runtimes load too), or one for onnxruntime-genai."""

_EVERYWHERE: frozenset[Layout] = frozenset({"huggingface", "genai"})
_HUGGINGFACE: frozenset[Layout] = frozenset({"huggingface"})


@dataclass(frozen=True)
class SideFile:
    """One entry of the list.

    Attributes:
        pattern: path of the file in the model folder, or a glob pattern of paths.
        purpose: what it is for.
        layouts: which artifacts get a copy.
    """

    pattern: str
    purpose: str
    layouts: frozenset[Layout]


SIDE_FILES = (
    SideFile("generation_config.json", "defaults of generate()", _HUGGINGFACE),
    SideFile("preprocessor_config.json", "preparation of images and audio", _HUGGINGFACE),
    SideFile("processor_config.json", "preparation of several kinds of input together", _HUGGINGFACE),
    SideFile("tokenizer.json", "fast tokenizer", _EVERYWHERE),
    SideFile("tokenizer_config.json", "class and options of the tokenizer", _EVERYWHERE),
    SideFile("special_tokens_map.json", "roles of special tokens", _EVERYWHERE),
    SideFile("added_tokens.json", "tokens added after training", _EVERYWHERE),
    SideFile("tokenizer.model", "SentencePiece model", _EVERYWHERE),
    SideFile("sentencepiece.bpe.model", "SentencePiece model of XLM-R and its kin", _HUGGINGFACE),
    SideFile("spiece.model", "SentencePiece model of T5, ALBERT and their kin", _HUGGINGFACE),
    SideFile("vocab.json", "vocabulary of byte-pair encodings", _EVERYWHERE),
    SideFile("vocab.txt", "vocabulary of WordPiece", _HUGGINGFACE),
    SideFile("merges.txt", "merges of byte-pair encodings", _EVERYWHERE),
    SideFile("modules.json", "what a sentence embedding is made of", _HUGGINGFACE),
    SideFile("config_sentence_transformers.json", "prompts and similarity of embeddings", _HUGGINGFACE),
    SideFile("sentence_bert_config.json", "longest text of an embedding", _HUGGINGFACE),
    SideFile("*_Pooling/config.json", "how hidden states become an embedding", _HUGGINGFACE),
    SideFile("chat_template.jinja", "how a conversation becomes a prompt", _EVERYWHERE),
    SideFile(
        "model.safetensors.index.json", "which weight files belong to the model; an artifact has its own", frozenset()
    ),
)


def find_side_files(folder: Path, layout: Layout | None = None) -> list[Path]:
    """The files in ``folder`` that are on the list, in its order.

    Args:
        folder: of a model.
        layout: only those that are copied into artifacts of this kind.
    """
    entries = [entry for entry in SIDE_FILES if layout is None or layout in entry.layouts]
    found = [path for entry in entries for path in sorted(folder.glob(entry.pattern)) if path.is_file()]
    return list(dict.fromkeys(found))


def copy_side_files(folder: Path | None, out: Path, layout: Layout) -> dict[str, str]:
    """Copy what an artifact of this kind gets; copies, never links: some loaders refuse files with several names.

    Args:
        folder: of the source model; None for a model that came from memory and has no files.
        out: the artifact's folder.
        layout: its kind.

    Returns:
        Path in the folder -> SHA-256.
    """
    copied: dict[str, str] = {}
    if folder is None:
        return copied
    for source in find_side_files(folder, layout):
        name = source.relative_to(folder).as_posix()
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source, out / name)
        copied[name] = digest_file(out / name)[0]
    return copied
