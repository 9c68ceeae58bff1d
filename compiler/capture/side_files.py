"""The files beside config and weights in a model folder, and what an artifact gets of them.

This is the only list. What every backend copies, and what decides whether an earlier result may be used again, is read from it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from compile_sparse.compiler.capture.generation import GENERATION_FILE, generation_defaults
from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.files.digests import digest_file
from compile_sparse.compiler.files.inside import require_inside
from compile_sparse.compiler.ir.program import Program

__all__ = [
    "LABELS_FILE",
    "NEVER_COPIED",
    "SIDE_FILES",
    "SideFile",
    "check_folder",
    "find_side_files",
    "write_labels",
    "write_side_files",
]

LABELS_FILE = "config.json"
"""What tells loaders of processors and pipelines which model a graph is."""

GRAPH_FILE = "compile_sparse.json"
"""What folders of graphs have, and those of models have not."""


@dataclass(frozen=True)
class SideFile:
    """One entry of the list.

    Attributes:
        pattern: path of the file in the model folder, or a glob pattern of paths; case does not matter.
        purpose: what it is for.
        copied: whether artifacts get a copy.
        name: of the copy; empty: the file's own.
    """

    pattern: str
    purpose: str
    copied: bool = True
    name: str = ""


SIDE_FILES = (
    SideFile(GENERATION_FILE, "defaults of generate(): tokens that end a text, sampling"),
    SideFile("preprocessor_config.json", "preparation of images and audio"),
    SideFile("video_preprocessor_config.json", "preparation of videos"),
    SideFile("processor_config.json", "preparation of several kinds of input together"),
    SideFile("audio_tokenizer_config.json", "which codec makes tokens of audio"),
    SideFile("tokenizer.json", "fast tokenizer"),
    SideFile("tokenizer_config.json", "class and options of the tokenizer"),
    SideFile("special_tokens_map.json", "roles of special tokens"),
    SideFile("added_tokens.json", "tokens added after training"),
    SideFile("tokenizer.model*", "SentencePiece or tiktoken model, and Mistral's numbered ones"),
    SideFile("tekken.json", "Mistral's tokenizer"),
    SideFile("*.tiktoken", "tiktoken model"),
    SideFile("tiktoken.model", "tiktoken model"),
    SideFile("sentencepiece*.model", "SentencePiece model of XLM-R, CamemBERT and their kin"),
    SideFile("spiece.model", "SentencePiece model of T5, ALBERT and their kin"),
    SideFile("*.spm", "SentencePiece models of Marian"),
    SideFile("spm*.model", "SentencePiece model of DeBERTa and its kin"),
    SideFile("*vocab.json", "vocabulary of byte-pair encodings, of targets, of entities"),
    SideFile("vocab-*.json", "vocabularies of translation, by side"),
    SideFile("vocab.txt", "vocabulary of WordPiece"),
    SideFile("merges.txt", "merges of byte-pair encodings"),
    SideFile("bpe.codes", "merges of byte-pair encodings"),
    SideFile("dict.txt", "vocabulary of fairseq's models"),
    SideFile("prophetnet.tokenizer", "vocabulary of ProphetNet"),
    SideFile("byte_maps.json", "bytes of BLT's and MyT5's tokens"),
    SideFile("emoji.json", "spellings of Japanese GPT-NeoX"),
    SideFile("word_*.json", "shapes and pronunciations of RoCBert's words"),
    SideFile("normalizer.json", "spelling rules of speech recognition"),
    SideFile("modules.json", "what a sentence embedding is made of"),
    SideFile("config_sentence_transformers.json", "prompts and similarity of embeddings"),
    SideFile("sentence_bert_config.json", "longest text of an embedding"),
    SideFile("*_Pooling/config.json", "how hidden states become an embedding"),
    SideFile("[1-9]_*/config.json", "further layers of a sentence embedding"),
    SideFile("[1-9]_*/model.safetensors", "their weights"),
    SideFile("chat_template.jinja", "how a conversation becomes a prompt"),
    SideFile("chat_template.json", "how a conversation becomes a prompt, of processors"),
    SideFile("additional_chat_templates/*.jinja", "further ways, by name"),
    SideFile("*.jinja", "further ways, as servers are given them"),
    SideFile("id2label.json", "names of classes"),
    SideFile("labels.txt", "names of classes"),
    SideFile("LICEN[CS]E*", "under which terms the model may be used; they hold for what is made of it"),
    SideFile("*LICEN[CS]E", "the same with the model's name before it"),
    SideFile("*LICEN[CS]E.md", "the same"),
    SideFile("*LICEN[CS]E.txt", "the same"),
    SideFile("*LICEN[CS]E.pdf", "the same"),
    SideFile("LICEN[CS]ES/*", "the same, one file for each"),
    SideFile("COPYING*", "the same under GNU's name"),
    SideFile("COPYRIGHT*", "whose it is"),
    SideFile("TERMS*", "under which terms it may be used"),
    SideFile("*NOTICE*.md", "what must be said with every copy, of third parties too"),
    SideFile("*NOTICE*.txt", "the same"),
    SideFile("NOTICE*", "the same"),
    SideFile("USE_POLICY*", "what the model may not be used for"),
    # What it says of sizes, speed and quality is said of the dense model: it must not pass for the artifact's own.
    SideFile("README.md", "the source model's card", name="source_README.md"),
    SideFile("source_README.md", "the card of the model that the source was made from"),
    SideFile("model.safetensors.index.json", "which weight files belong to the model; an artifact has its own", copied=False),
)  # fmt: skip

NEVER_COPIED = (".py", ".pyc", ".so", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Endings of code and pickles, whatever the rest of the name is."""

_KEPT = (
    *("model_type", "architectures", "id2label", "label2id", "problem_type"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id", "mask_token_id"),
    *("vocab_size", "type_vocab_size", "max_position_embeddings", "image_size", "num_channels", "num_mel_bins"),
)
"""Keys of a config that no compression changes."""


def check_folder(folder: Path) -> None:
    """Stop at folders that are not a model's, before anything in them is read.

    Raises:
        UsageError: CS1003 for the folder of a graph that was compiled: its config has no sizes.
        ModelError: CS2010 when a side file is a link that leads out of the folder.
    """
    if (folder / GRAPH_FILE).is_file():
        raise UsageError(
            "CS1003",
            "The folder holds a compiled graph, not a model to compile.",
            where=folder.name,
            why=f"It has a {GRAPH_FILE}; its config.json, if any, only names the model and its classes.",
            hint="Point MODEL at the folder that the graph was compiled from.",
        )
    find_side_files(folder)


def find_side_files(folder: Path, *, copied: bool = False) -> list[Path]:
    """The files in ``folder`` that are on the list, in its order.

    Args:
        folder: of a model.
        copied: only those that artifacts get.

    Raises:
        ModelError: CS2010 when one is a link that leads out of the folder.
    """
    return [folder / found for found, entry in _found(folder) if entry.copied or not copied]


def _found(folder: Path) -> Iterator[tuple[PurePosixPath, SideFile]]:
    """Each listed file once, with the first entry that names it."""
    deepest = max(len(PurePosixPath(entry.pattern).parts) for entry in SIDE_FILES)
    files = sorted(PurePosixPath(path.relative_to(folder)) for path in _files(folder, deepest))
    seen: set[PurePosixPath] = set()
    for entry in SIDE_FILES:
        for path in files:
            if path not in seen and _matches(path, entry.pattern):
                seen.add(path)
                if require_inside(folder, folder / path).is_file():
                    yield path, entry


def _files(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = list(folder.iterdir())
    except PermissionError:  # a folder beside the model's files that is not for us
        return
    for path in entries:
        if path.is_dir():
            # A link to a folder is looked into: what is listed there leads out of this one and is refused by name.
            yield from _files(path, depth - 1) if depth > 1 else ()
        elif path.is_file() or path.is_symlink():
            yield path


def _matches(path: PurePosixPath, pattern: str) -> bool:
    parts, wanted = path.parts, PurePosixPath(pattern).parts
    if path.suffix.lower() in NEVER_COPIED:
        return False
    return len(parts) == len(wanted) and all(
        fnmatchcase(part.lower(), each.lower()) for part, each in zip(parts, wanted, strict=True)
    )


def write_side_files(program: Program, out: Path) -> dict[str, str]:
    """Write what the artifact of a model gets beside it into ``out``.

    Files are copied, never linked: some loaders refuse files with several names. A decoder's ``generation_config.json`` also has
    what only the source's config says, see ``generation_defaults``.

    Returns:
        Path in the folder -> SHA-256; nothing for a model that came from memory and has no files.

    Raises:
        ModelError: CS2010 when one of the files is a link that leads out of the source's folder.
    """
    folder = program.source.folder
    if folder is None:
        return {}
    written: dict[str, str] = {}
    # Backwards, so that of two files that become one the first entry's stays.
    for path, entry in reversed([each for each in _found(folder) if each[1].copied]):
        name = entry.name or path.as_posix()
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / path, out / name)
        written[name] = digest_file(out / name)[0]
    if program.kind == "decoder":
        defaults = generation_defaults(folder, program.config)
        if defaults.added:
            written[GENERATION_FILE] = _write_json(out / GENERATION_FILE, defaults.values)
    return dict(sorted(written.items()))


def write_labels(program: Program, out: Path) -> dict[str, str]:
    """A ``config.json`` for a graph, whose folder has none: what the model is and how its classes are called, no sizes of layers.

    Returns:
        Its name -> SHA-256.
    """
    kept = {key: program.config[key] for key in _KEPT if program.config.get(key) is not None}
    return {LABELS_FILE: _write_json(out / LABELS_FILE, kept)}


def _write_json(path: Path, content: Mapping[str, Any]) -> str:
    text = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    path.write_bytes(text)
    return hashlib.sha256(text).hexdigest()
