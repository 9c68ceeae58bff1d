"""Evaluation data of models that do not generate, from the command line to the report, and from the artifact alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers as hf
from tokenizers import processors

from tests.onnxruntime.end_to_end.commands import byte_tokenizer
from tests.random_weights import randomised
from tests.shell import shell

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXTS = [f"{word} number {number}" for number in range(8) for word in ("apples", "pears", "plums")]
QUICK = ("--workload", "batch=2,rounds=3")


@pytest.fixture(scope="module")
def classifier(root: Path) -> Path:
    folder = root / "classifier"
    config = hf.BertConfig(**SIZES, vocab_size=257, max_position_embeddings=64, num_labels=3)
    randomised(hf.BertForSequenceClassification(config)).save_pretrained(folder)
    made = byte_tokenizer()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(folder / "tokenizer.json"))
    return folder


def said_by_torch(folder: Path) -> list[int]:
    """The classes that transformers gives ``TEXTS``."""
    model = hf.BertForSequenceClassification.from_pretrained(folder).eval()
    found = []
    for text in TEXTS:
        ids = [0, *byte_tokenizer().encode(text).ids]
        with torch.no_grad():
            found.append(int(model(input_ids=torch.tensor([ids])).logits.argmax()))
    return found


def test_a_classifier_on_labelled_lines(classifier: Path, tmp_path: Path) -> None:
    truth = said_by_torch(classifier)
    labels = [label if place % 4 else (label + 1) % 3 for place, label in enumerate(truth)]
    file = tmp_path / "labels.jsonl"
    entries = ({"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True))
    file.write_text("".join(json.dumps(each) + "\n" for each in entries))
    words = (classifier, "--target", "ort-cpu", "--quantize", "w8a8", *QUICK, "--eval", f"fruit={file}")
    gates = ("--gate", "accuracy[fruit]>=0.5x", "--gate", "f1[fruit]>=0.01", "--max-quality-loss", "none")
    found = shell(*words, *gates, "--out", tmp_path / "out")
    assert found.code == 0, found.out
    slice_ = found.data["quality"]["slices"]["fruit"]
    assert slice_["scores"]["accuracy"]["baseline"] == pytest.approx(0.75)
    assert slice_["samples"] == len(TEXTS)
    assert found.data["quality"]["known"]
    # The artifact has all that measuring it again needs.
    again = shell("verify", tmp_path / "out", "--eval", f"fruit={file}", "--gate", "accuracy[fruit]<=0.1")
    assert again.code == 3, again.out
    assert again.data["quality"]["slices"]["fruit"] == slice_
    assert [gate["passed"] for gate in again.data["gates"]] == [False]


def test_a_wrong_line_is_said_before_anything_is_compiled(classifier: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"query": "a", "document": "b"}\n')
    words = (classifier, "--target", "ort-cpu", "--out", tmp_path / "out")
    found = shell(*words, "--eval", f"fruit={file}")
    assert (found.code, found.error["code"], found.error["where"]) == (2, "CS1055", "pairs.jsonl, line 1")
    file.write_text('{"text": "a", "label": 1}\n{"text": "a", "label": 7}\n')
    found = shell(*words, "--eval", f"fruit={file}")
    assert (found.code, found.error["code"], found.error["where"]) == (2, "CS1058", "pairs.jsonl, line 2")


def test_a_destroyed_backbone_is_not_called_faster(tmp_path: Path) -> None:
    """Nobody gave data: what is left of the dense model's features on seeded images says enough."""
    torch.manual_seed(0)
    config = hf.ViTConfig(**SIZES | {"num_hidden_layers": 4}, image_size=32, patch_size=8)
    model = randomised(hf.ViTModel(config))
    with torch.no_grad():  # as in trained models, blocks say more than the embedding they are added to
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "fc2.weight")):
                weight *= 20
    model.save_pretrained(tmp_path / "vit")
    words = (tmp_path / "vit", "--target", "ort-cpu", "--prune", "channels=0.75", "--prune", "heads=0.5", *QUICK)
    found = shell(*words, "--out", tmp_path / "out")
    assert found.code == 3, found.out
    assert found.data["fidelity"]["mean_cosine"] > 0.99  # the runtime computes what is left of it rightly
    assert found.data["quality"]["slices"]["seeded"]["mean_cosine"] < 0.5
    assert found.data["quality"]["known"] is False
    assert found.data["verdict"] == "quality-lost"
    allowed = shell("verify", tmp_path / "out", "--max-quality-loss", "none")
    assert allowed.code == 0, allowed.out
    images = tmp_path / "images.npz"
    np.savez(images, pixel_values=np.random.default_rng(0).standard_normal((5, 3, 32, 32)).astype(np.float32))
    given = shell("verify", tmp_path / "out", "--eval", f"images={images}")
    assert given.code == 3, given.out
    assert given.data["quality"]["known"] is True
    assert given.data["quality"]["slices"]["images"]["samples"] == 5


def test_images_of_a_chosen_size(tmp_path: Path) -> None:
    """The artifact takes them, and gives what the class gives when it stretches its table of positions."""
    torch.manual_seed(0)
    model = randomised(hf.ViTModel(hf.ViTConfig(**SIZES, image_size=32, patch_size=8)))
    model.save_pretrained(tmp_path / "vit")
    pixels = np.random.default_rng(0).standard_normal((4, 3, 16, 40)).astype(np.float32)
    np.savez(tmp_path / "images.npz", pixel_values=pixels)
    words = (tmp_path / "vit", "--target", "ort-cpu", "--image-size", "16x40", "--eval", f"x={tmp_path / 'images.npz'}")
    found = shell(*words, *QUICK, "--out", tmp_path / "out")
    assert found.code == 0, found.out
    assert found.data["quality"]["slices"]["x"]["samples"] == 4
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels), interpolate_pos_encoding=True).last_hidden_state.numpy()
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model" / "model.onnx")
    given = session.run(["last_hidden_state"], {"pixel_values": pixels})[0]
    assert np.abs(given - expected).max() <= 1e-5 * np.abs(expected).max()
    again = shell("verify", tmp_path / "out", "--eval", f"x={tmp_path / 'images.npz'}")
    assert again.code == 0, again.out
    # transformers asks for a flag that a folder cannot carry, and says so.
    refused = shell(tmp_path / "vit", "--target", "hf", "--image-size", "16x40", *QUICK, "--out", tmp_path / "hf")
    assert (refused.code, refused.error["code"]) == (4, "CS4205")
    assert "doesn't match model" in refused.error["why"]


def test_text_has_no_size_of_images(classifier: Path, tmp_path: Path) -> None:
    found = shell(classifier, "--target", "ort-cpu", "--image-size", "16", *QUICK, "--out", tmp_path / "out")
    assert (found.code, found.error["code"]) == (2, "CS1062")
