"""Files of every kind for models of every kind: read as transformers' own tokenizers read, or refused with the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from compile_sparse.compiler.capture.tasks import task_of
from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.execution.token_windows import load_tokenizer
from compile_sparse.compiler.verify.evaluation.arrays import LabelledArrays
from compile_sparse.compiler.verify.evaluation.classification import IGNORED, LabelledText
from compile_sparse.compiler.verify.evaluation.embeddings import Pairs, Sentences
from compile_sparse.compiler.verify.evaluation.masked import MaskedText
from compile_sparse.compiler.verify.evaluation.outputs import TextOutputs
from compile_sparse.compiler.verify.evaluation.reader import EvaluationReader

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnop", "##b", "##c", "##d"]
CONFIG = hf.BertConfig(vocab_size=len(WORDS), max_position_embeddings=12, id2label={0: "no", 1: "yes", 2: "maybe"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WordPiece tokenizer that pads and cuts batches, as published ones do."""
    out = tmp_path_factory.mktemp("tokenizer")
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_padding(length=10)
    made.enable_truncation(4)
    made.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps({"mask_token": "[MASK]"}))
    return out


def reader(folder: Path | None, name: str, config: Any = CONFIG, **options: Any) -> EvaluationReader:
    return EvaluationReader(folder, config, getattr(hf, name), **options)


def lines(path: Path, *entries: Any) -> Path:
    (path / "x.jsonl").write_text("".join(json.dumps(each) + "\n" for each in entries))
    return path / "x.jsonl"


TASKS = {
    "LlamaForCausalLM": "causal-lm",
    "BertForMaskedLM": "masked-lm",
    "BertModel": "embedding",
    "ModernBertModel": "embedding",
    "T5EncoderModel": "embedding",
    "RobertaForSequenceClassification": "sequence-classification",
    "DistilBertForTokenClassification": "token-classification",
    "BertForQuestionAnswering": "other",
    "ViTModel": "vision",
    "ResNetForImageClassification": "vision",
    "WhisperForAudioClassification": "audio",
}


@pytest.mark.parametrize("name", TASKS)
def test_tasks(name: str) -> None:
    assert task_of(getattr(hf, name)) == TASKS[name]


def test_settings_for_batches_in_a_tokenizers_file_are_not_ours(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    assert tokenizer.encode("a b c d e f", add_special_tokens=False).ids == [5, 6, 7, 8, 9, 10]


def test_sentences_and_pairs(folder: Path, tmp_path: Path) -> None:
    bert = reader(folder, "BertModel")
    found = bert.read(lines(tmp_path, {"text": "a b"}, {"text": "c d e f g h i j k l m n"}))
    assert isinstance(found, Sentences)
    assert [text.ids for text in found.texts] == [(2, 5, 6, 3), (2, *range(7, 17), 3)]  # cut to the model's 12
    assert found.pooling.assumed
    found = bert.read(lines(tmp_path, {"query": "a", "document": "b c"}))
    assert isinstance(found, Pairs)
    assert (found.queries[0].ids, found.documents[0].ids) == ((2, 5, 3), (2, 6, 7, 3))


def test_a_masked_model_reads_whole_texts_in_windows(folder: Path, tmp_path: Path) -> None:
    file = lines(tmp_path, {"text": "a b c d e f g h i j k"}, {"text": "a"})
    found = reader(folder, "BertForMaskedLM", length=8).read(file)
    assert isinstance(found, MaskedText)
    assert found.mask == 4
    assert [text.ids for text in found.texts] == [(2, *range(5, 11), 3), (2, *range(11, 16), 3), (2, 5, 3)]
    assert found.texts[1].special == (True, *[False] * 5, True)


def test_labels_by_name_and_number_and_two_texts(folder: Path, tmp_path: Path) -> None:
    entries = [{"text": "a", "text_pair": "b c", "label": "maybe"}, {"text": "d", "label": 1}]
    found = reader(folder, "BertForSequenceClassification").read(lines(tmp_path, *entries))
    assert isinstance(found, LabelledText)
    assert found.labels == (2, 1)
    assert (found.texts[0].ids, found.texts[0].types) == ((2, 5, 3, 6, 7, 3), (0, 0, 0, 1, 1, 1))
    reranker = hf.BertConfig(vocab_size=len(WORDS), max_position_embeddings=12, num_labels=1)
    found = reader(folder, "BertForSequenceClassification", reranker).read(lines(tmp_path, {"text": "a", "label": 0.5}))
    assert isinstance(found, LabelledText)
    assert found.labels == (0.5,)


def test_labels_of_words_are_those_of_their_first_tokens(folder: Path, tmp_path: Path) -> None:
    file = lines(tmp_path, {"tokens": ["a", "abc", "d"], "labels": ["yes", "no", -100]})
    found = reader(folder, "BertForTokenClassification").read(file)
    assert isinstance(found, LabelledText)
    assert found.texts[0].ids == (2, 5, 5, 21, 22, 8, 3)  # a, a ##b ##c, d
    assert found.labels == ((IGNORED, 1, 0, IGNORED, IGNORED, IGNORED, IGNORED),)


def test_heads_of_other_kinds_take_texts(folder: Path, tmp_path: Path) -> None:
    found = reader(folder, "BertForQuestionAnswering").read(lines(tmp_path, {"text": "a", "text_pair": "b"}))
    assert isinstance(found, TextOutputs)
    assert found.texts[0].types == (0, 0, 0, 1, 1)


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    config = hf.BertConfig(vocab_size=20, max_position_embeddings=12, cls_token_id=2, mask_token_id=4)
    found = reader(None, "BertForMaskedLM", config).read(lines(tmp_path, {"input_ids": [2, 5, 6]}))
    assert isinstance(found, MaskedText)
    assert (found.texts[0].ids, found.texts[0].special, found.mask) == ((2, 5, 6), (True, False, False), 4)


TEXT, PAIR, LABEL = {"text": "a"}, {"query": "a", "document": "b"}, {"text": "a", "label": 1}
UNFIT = {
    "pairs for a classifier": ("BertForSequenceClassification", [PAIR], "CS1055", "x.jsonl, line 1"),
    "labels for an embedding": ("BertModel", [LABEL], "CS1055", "x.jsonl, line 1"),
    "pairs for a masked model": ("BertForMaskedLM", [PAIR], "CS1055", "x.jsonl, line 1"),
    "a class that is not there": (
        "BertForSequenceClassification",
        [LABEL, {"text": "a", "label": 3}],
        "CS1058",
        "line 2",
    ),
    "a name that is not there": ("BertForSequenceClassification", [{"text": "a", "label": "nope"}], "CS1058", "line 1"),
    "another kind of line": ("BertModel", [PAIR, TEXT], "CS1031", "x.jsonl, line 2"),
    "an id beyond the vocabulary": ("BertModel", [{"input_ids": [2, 999]}], "CS1031", "x.jsonl, line 1"),
    "more ids than positions": ("BertModel", [TEXT, {"input_ids": [5] * 13}], "CS1031", "x.jsonl, line 2"),
    "lines for an image model": ("ViTModel", [TEXT], "CS1055", "x.jsonl"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_refused_with_its_line(name: str, folder: Path, tmp_path: Path) -> None:
    model, entries, code, where = UNFIT[name]
    config = hf.ViTConfig(image_size=8, patch_size=4) if model == "ViTModel" else CONFIG
    with pytest.raises(UsageError) as caught:
        reader(folder, model, config).read(lines(tmp_path, *entries))
    assert caught.value.code == code
    assert caught.value.where.endswith(where)


def test_what_is_missing_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="CS1035"):
        reader(None, "BertModel").read(lines(tmp_path, TEXT))
    with pytest.raises(UsageError, match="CS1057"):
        reader(None, "BertForMaskedLM").read(lines(tmp_path, {"input_ids": [2, 5]}))
    with pytest.raises(UsageError, match="CS1036"):
        reader(folder, "BertModel", length=13).read(lines(tmp_path, TEXT))


VIT = hf.ViTConfig(image_size=8, patch_size=4, num_labels=3)
IMAGES = np.zeros((5, 3, 8, 8), np.float32)


def archive(path: Path, **arrays: Any) -> Path:
    np.savez(path / "x.npz", **arrays)
    return path / "x.npz"


def test_arrays_with_labels(tmp_path: Path) -> None:
    given = archive(tmp_path, pixel_values=IMAGES, labels=np.array([0, 1, 2, 0, 1]))
    found = reader(None, "ViTForImageClassification", VIT).read(given)
    assert isinstance(found, LabelledArrays)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 2, 0, 1]
    found = reader(None, "ViTForImageClassification", VIT).read(given, samples=2)
    assert isinstance(found, LabelledArrays)
    assert (found.samples, None if found.labels is None else found.labels.tolist()) == (2, [0, 2])
    whisper = hf.WhisperConfig(num_mel_bins=4, max_source_positions=3, num_labels=2)
    given = archive(tmp_path, input_features=np.zeros((2, 4, 6)), labels=np.array([0, 1]))
    assert reader(None, "WhisperForAudioClassification", whisper).read(given).samples == 2


@pytest.mark.parametrize(
    ("model", "arrays", "part"),
    [
        ("ViTModel", {"pixel_values": IMAGES[:, :, :4]}, "pixel_values [samples, 3, 8, 8]"),
        ("ViTModel", {"images": IMAGES}, "pixel_values [samples, 3, 8, 8]"),
        ("ViTModel", {"pixel_values": IMAGES, "mask": IMAGES}, "pixel_values [samples, 3, 8, 8]"),
        ("ViTModel", {"pixel_values": IMAGES, "labels": np.zeros(5, int)}, "no classes"),
        ("ViTForImageClassification", {"pixel_values": IMAGES, "labels": np.full(5, 3)}, "0 to 2"),
        ("ViTForImageClassification", {"pixel_values": IMAGES, "labels": np.zeros(5)}, "whole numbers"),
    ],
)
def test_arrays_that_do_not_fit(model: str, arrays: dict[str, Any], part: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        reader(None, model, VIT).read(archive(tmp_path, **arrays))
    assert caught.value.code == "CS1055"
    assert part in caught.value.why
