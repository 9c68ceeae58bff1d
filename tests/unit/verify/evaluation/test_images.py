"""Folders of images: prepared as transformers' own processor does, labelled by their folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import transformers as hf

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.recipes.recipe import Evaluation, Recipe
from compile_sparse.compiler.verify.evaluation import images
from compile_sparse.compiler.verify.evaluation.arrays import LabelledArrays
from compile_sparse.compiler.verify.evaluation.reader import EvaluationReader

VIT = hf.ViTConfig(image_size=8, patch_size=4, id2label={0: "cat", 1: "dog"})
PREPARATION = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 8, "width": 8},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.25, 0.2],
    "resample": 2,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(PREPARATION))
    return tmp_path / "model"


def drawn(path: Path, *names: str) -> Path:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for seed, name in enumerate(names):
        pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
        (path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels).save(path / "set" / name)
    return path / "set"


def test_labelled_folders(model: Path, tmp_path: Path) -> None:
    folder = drawn(tmp_path, "cat/a.png", "cat/b.png", "dog/c.png", "0/d.png")
    found = EvaluationReader(model, VIT, hf.ViTForImageClassification).read(folder)
    assert isinstance(found, LabelledArrays)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 0, 0, 1]  # 0, cat, cat, dog: sorted by path
    # Images of the right size are only scaled: by hand.
    pixels = np.random.default_rng(2).integers(0, 256, (8, 8, 3), np.uint8) / 255
    expected = ((pixels - PREPARATION["image_mean"]) / PREPARATION["image_std"]).transpose(2, 0, 1)
    assert np.allclose(found.arrays["pixel_values"][3], expected, atol=1e-5)


def test_a_backbone_takes_images_without_classes(model: Path, tmp_path: Path) -> None:
    found = EvaluationReader(model, VIT, hf.ViTModel).read(drawn(tmp_path, "a.png", "b.png", "c.png"), samples=2)
    assert isinstance(found, LabelledArrays)
    assert (found.samples, found.labels) == (2, None)


@pytest.mark.parametrize(
    ("preparation", "resized", "left", "top"),
    [
        ({"size": {"height": 8, "width": 8}}, (12, 16), 0, 0),  # everything is kept
        ({"size": {"shortest_edge": 8}}, (12, 16), 0, 0),  # nothing is cut off
        ({"size": {"height": 10, "width": 10}, "do_center_crop": True, "crop_size": 8}, (15, 20), 1, 2),  # 8 of 10
        (
            {"size": {"shortest_edge": 10}, "do_center_crop": True, "crop_size": 8},
            (20, 20),
            4,
            2,
        ),  # the shorter edge fits
    ],
)
def test_images_of_another_size(
    model: Path, tmp_path: Path, preparation: dict[str, object], resized: tuple[int, int], left: int, top: int
) -> None:
    kind = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}
    (model / "preprocessor_config.json").write_text(json.dumps({**PREPARATION, **kind, **preparation}))
    folder = drawn(tmp_path, "a.png")
    found = EvaluationReader(model, VIT, hf.ViTModel, image_size=(12, 16)).read(folder)
    assert isinstance(found, LabelledArrays)
    # The same by Pillow.
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    height, width = resized
    pixels = np.asarray(image.open(folder / "a.png").convert("RGB").resize((width, height), image.Resampling.BILINEAR))
    cut = pixels[left : left + 12, top : top + 16] / 255
    expected = ((cut - PREPARATION["image_mean"]) / PREPARATION["image_std"]).transpose(2, 0, 1)
    # One step of a byte: resizing rounds.
    assert np.abs(found.arrays["pixel_values"][0] - expected).max() <= 1.01 / 255 / min(PREPARATION["image_std"])


def test_arrays_must_have_the_size(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", pixel_values=np.zeros((2, 3, 8, 8), np.float32))
    EvaluationReader(model, VIT, hf.ViTModel).read(tmp_path / "x.npz")
    with pytest.raises(UsageError, match=r"\[samples, 3, 12, 16\].*--image-size"):
        EvaluationReader(model, VIT, hf.ViTModel, image_size=(12, 16)).read(tmp_path / "x.npz")


def test_what_cannot_be_read_is_said(model: Path, tmp_path: Path) -> None:
    reader = EvaluationReader(model, VIT, hf.ViTForImageClassification)
    folder = drawn(tmp_path, "cat/a.png", "bird/b.png")
    with pytest.raises(UsageError, match="CS1058"):
        reader.read(folder)
    (folder / "bird" / "b.png").unlink()
    (folder / "cat" / "b.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"cat/b\.png"):
        reader.read(folder)
    (folder / "c.png").write_bytes(b"beside the folders")
    with pytest.raises(UsageError, match="one folder per class"):
        reader.read(folder)
    with pytest.raises(UsageError, match=r"preprocessor_config\.json"):
        EvaluationReader(None, VIT, hf.ViTModel).read(folder)


def test_without_pillow_the_way_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install .compile-sparse\[images\]") as caught:
        EvaluationReader(None, VIT, hf.ViTModel).read(tmp_path)
    assert caught.value.code == "CS1059"


def test_a_recipe_remembers_what_lies_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(b"1")
    recipe = Recipe(evaluation=Evaluation(slices={"x": str(tmp_path)}))
    before = recipe.canonical()["evaluation"]["slices"]["x"]
    assert recipe.canonical()["evaluation"]["slices"]["x"] == before
    (tmp_path / "cat" / "a.png").rename(tmp_path / "cat" / "b.png")
    assert recipe.canonical()["evaluation"]["slices"]["x"] != before
