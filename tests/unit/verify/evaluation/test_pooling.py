"""What a folder in the layout of sentence-transformers says of its embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.verify.evaluation.pooling import read_pooling

STATES = np.random.default_rng(0).standard_normal((5, 4))
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}


def folder(path: Path, pooling: Any = None, modules: Any = None, **files: Any) -> Path:
    if pooling is not None:
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if modules is not None:
        (path / "modules.json").write_text(json.dumps(modules))
    for name, data in files.items():
        (path / f"{name}.json").write_text(json.dumps(data))
    return path


EXPECTED = {
    "cls_token": STATES[0],
    "mean_tokens": STATES.mean(0),
    "max_tokens": STATES.max(0),
    "mean_sqrt_len_tokens": STATES.sum(0) / 5**0.5,
    "weightedmean_tokens": (STATES * np.arange(1, 6)[:, None]).sum(0) / 15,
    "lasttoken": STATES[4],
}


@pytest.mark.parametrize("mode", EXPECTED)
def test_each_mode(mode: str, tmp_path: Path) -> None:
    said = {f"pooling_mode_{name}": name == mode for name in EXPECTED}
    settings = {"similarity_fn_name": "dot"}
    found = read_pooling(folder(tmp_path, said, MODULES, config_sentence_transformers=settings))
    assert found.assumed == ""
    assert found.embedding(STATES) == pytest.approx(EXPECTED[mode])


def test_several_modes_are_joined_and_newer_names_are_read(tmp_path: Path) -> None:
    found = read_pooling(folder(tmp_path, {"pooling_mode": ["mean", "cls"]}, [*MODULES, NORMALIZE]))
    joined = np.concatenate([STATES[0], STATES.mean(0)])
    assert found.embedding(STATES) == pytest.approx(joined / np.linalg.norm(joined))
    assert found.normalize


def test_the_models_own_limit_and_similarity(tmp_path: Path) -> None:
    files = {
        "sentence_bert_config": {"max_seq_length": 128},
        "config_sentence_transformers": {"similarity_fn_name": "dot"},
    }
    found = read_pooling(folder(tmp_path, {"pooling_mode_cls_token": True}, MODULES, **files))
    assert (found.max_tokens, found.similarity) == (128, "dot")
    assert np.linalg.norm(found.embedding(STATES)) != pytest.approx(1.0)


def test_a_mean_is_assumed_only_when_nothing_says_otherwise_and_said(tmp_path: Path) -> None:
    found = read_pooling(tmp_path)
    assert "no pooling config" in found.assumed
    assert found.embedding(STATES) == pytest.approx(STATES.mean(0) / np.linalg.norm(STATES.mean(0)))
    assert found.embedding(STATES.mean(0)) == pytest.approx(found.embedding(STATES))  # pooled by the model itself


DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}


@pytest.mark.parametrize(
    ("pooling", "modules", "files", "part"),
    [
        ({"pooling_mode_cls_token": True}, [*MODULES, DENSE], {}, "Dense"),
        ({"pooling_mode_attention": True}, MODULES, {}, "attention"),
        ({"pooling_mode_cls_token": False}, MODULES, {}, "no pooling on"),
        (
            {"pooling_mode_cls_token": True},
            MODULES,
            {"config_sentence_transformers": {"similarity_fn_name": "l1"}},
            "l1",
        ),
        (None, [MODULES[0], MODULES[1] | {"path": "../outside"}], {}, "outside"),
    ],
)
def test_what_is_not_computed_is_refused(pooling: Any, modules: Any, files: Any, part: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=part) as caught:
        read_pooling(folder(tmp_path, pooling, modules, **files))
    assert caught.value.code == "CS1056"
