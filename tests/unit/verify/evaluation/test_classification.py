"""Classifiers, rerankers and labelled images: right answers, equal answers, and models that are broken in known ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from compile_sparse.compiler.verify.evaluation.arrays import LabelledArrays
from compile_sparse.compiler.verify.evaluation.classification import IGNORED, LabelledText
from compile_sparse.compiler.verify.quality import slice_loss
from tests.unit.verify.evaluation.fakes import encoded, measured

DRAWS = np.random.default_rng(0)
TABLE = DRAWS.standard_normal((100, 7))
"""Class scores of a token; a text has those of its first one."""
TEXTS = tuple(encoded(*DRAWS.integers(10, 100, length).tolist()) for length in DRAWS.integers(1, 6, 40))
TRUE = tuple(int(TABLE[text.ids[1]].argmax()) for text in TEXTS)
LABELS = tuple(label if place % 5 else (label + 1) % 7 for place, label in enumerate(TRUE))
"""A fifth of them is not what the dense model says."""


def dense(feeds: Mapping[str, Any]) -> dict[str, Any]:
    return {"logits": TABLE[feeds["input_ids"][:, 1]]}


def changed(how: Any) -> Any:
    return lambda feeds: {"logits": how(dense(feeds)["logits"])}


def test_a_dense_model_is_as_right_as_its_labels_say() -> None:
    found = measured(LabelledText(TEXTS, LABELS), dense)
    assert found.scores is not None
    assert set(found.scores) == {"accuracy", "accuracy@5", "f1", "auc"}
    assert found.scores["accuracy"].baseline == pytest.approx(0.8)
    assert (found.loss, found.loss_of, found.top1_agreement) == (1.0, "accuracy", 1.0)
    assert found.logit_error == 0


@pytest.mark.parametrize("how", [lambda x: -x, lambda x: np.roll(x, 1, axis=-1), lambda x: x * 0, lambda x: x * np.nan])
def test_a_broken_head_is_lost(how: Any) -> None:
    assert slice_loss(measured(LabelledText(TEXTS, LABELS), dense, changed(how))) > 1.1
    assert slice_loss(measured(LabelledText(TEXTS, None), dense, changed(how))) > 1.1


def test_without_labels_agreement_decides() -> None:
    def flipped(feeds: Mapping[str, Any]) -> dict[str, Any]:
        rows = dense(feeds)["logits"].copy()
        rows[feeds["input_ids"][:, 1] % 2 == 0] *= -1
        return {"logits": rows}

    share = np.mean([text.ids[1] % 2 for text in TEXTS])
    found = measured(LabelledText(TEXTS, None), dense, flipped)
    assert (found.scores, found.loss_of) == (None, "agreement")
    assert found.top1_agreement == pytest.approx(share)
    assert found.loss == pytest.approx(1 / share)


def test_labels_of_another_task_cannot_hide_a_loss() -> None:
    """The dense model is never right on them, so a destroyed one is no worse."""
    wrong = tuple((label + 1) % 7 for label in TRUE)
    found = measured(LabelledText(TEXTS, wrong), dense, changed(lambda x: -x))
    assert found.loss_of == "agreement"
    assert slice_loss(found) > 1.1
    assert "commonest label" in (found.note or "")


SCORES = DRAWS.standard_normal(100)


def scored(feeds: Mapping[str, Any]) -> dict[str, Any]:
    return {"logits": SCORES[feeds["input_ids"][:, 1]][:, None]}


@pytest.mark.parametrize(
    ("name", "labels"), [("auc", lambda s: float(s > 0)), ("rank_correlation", lambda s: 3 * s + 1)]
)
def test_one_logit_is_a_score(name: str, labels: Any) -> None:
    wanted = tuple(labels(SCORES[text.ids[1]]) for text in TEXTS)
    found = measured(LabelledText(TEXTS, wanted), scored)
    assert found.scores is not None
    assert found.scores[name].baseline == pytest.approx(1.0)
    assert (found.loss_of, found.loss) == (name, pytest.approx(1.0))
    turned = measured(LabelledText(TEXTS, wanted), scored, lambda feeds: {"logits": -scored(feeds)["logits"]})
    assert slice_loss(turned) > 1.1
    alone = measured(LabelledText(TEXTS, None), scored, lambda feeds: {"logits": 2 * scored(feeds)["logits"]})
    assert (alone.loss_of, alone.rank_agreement) == ("rank_agreement", pytest.approx(1.0))


def test_tokens_are_judged_where_they_have_labels() -> None:
    def tokens(feeds: Mapping[str, Any]) -> dict[str, Any]:
        return {"logits": TABLE[feeds["input_ids"]]}

    texts = tuple(replace(text, words=(None, *range(len(text.ids) - 2), None)) for text in TEXTS)
    labels = tuple((IGNORED, *(int(TABLE[each].argmax()) for each in text.ids[1:-1]), IGNORED) for text in texts)
    wrong = tuple((IGNORED, (row[1] + 1) % 7, *row[2:]) for row in labels)
    found = measured(LabelledText(texts, wrong), tokens)
    count = sum(len(text.ids) - 2 for text in texts)
    assert found.scores is not None
    assert found.scores["accuracy"].baseline == pytest.approx(1 - len(texts) / count)
    unlabelled = measured(LabelledText(texts, None), tokens, lambda feeds: {"logits": -tokens(feeds)["logits"]})
    assert unlabelled.top1_agreement == 0.0


PIXELS = DRAWS.standard_normal((30, 3, 4, 4)).astype(np.float32)
HEAD = DRAWS.standard_normal((48, 7))


def looked(feeds: Mapping[str, Any]) -> dict[str, Any]:
    return {"logits": feeds["pixel_values"].reshape(len(feeds["pixel_values"]), -1) @ HEAD}


def test_labelled_images() -> None:
    labels = (PIXELS.reshape(30, -1) @ HEAD).argmax(-1)
    given = LabelledArrays({"pixel_values": PIXELS}, labels)
    found = measured(given, looked, inputs=("pixel_values",))
    assert found.scores is not None
    assert found.scores["accuracy"].baseline == found.scores["accuracy@5"].baseline == 1.0
    assert found.samples == 30
    broken = measured(given, looked, lambda feeds: {"logits": looked(feeds)["logits"][:, ::-1]}, ("pixel_values",))
    assert slice_loss(broken) > 1.1


def test_features_are_judged_by_their_cosine() -> None:
    def features(feeds: Mapping[str, Any]) -> dict[str, Any]:
        return {"last_hidden_state": feeds["pixel_values"].reshape(len(feeds["pixel_values"]), 16, 3)}

    given = LabelledArrays({"pixel_values": PIXELS})
    found = measured(given, features, lambda feeds: {"last_hidden_state": -features(feeds)["last_hidden_state"]})
    assert (found.loss_of, found.mean_cosine) == ("cosine", pytest.approx(-1.0))
    assert slice_loss(found) > 1.1
    assert measured(given, features).mean_cosine == pytest.approx(1.0)
