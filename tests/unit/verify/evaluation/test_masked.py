"""Hidden tokens: the oracle of the loss is transformers' own, on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from compile_sparse.compiler.verify.evaluation.masked import MASKED_SHARE, MaskedText, hidden_places
from tests.unit.verify.evaluation.fakes import encoded, measured

MASK = 3
DRAWS = np.random.default_rng(0)
TEXTS = tuple(encoded(*DRAWS.integers(4, 64, length).tolist()) for length in (20, 20, 33, 7, 2))
SLICE = MaskedText(TEXTS, MASK)


@pytest.fixture(scope="module")
def model() -> hf.BertForMaskedLM:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.3,
    )
    return hf.BertForMaskedLM(config).eval()


def logits(model: hf.BertForMaskedLM, noise: float = 0.0) -> Any:
    draws = np.random.default_rng(1)

    def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            found = model(**{name: torch.from_numpy(value) for name, value in feeds.items()}).logits.numpy()
        return {"logits": found + noise * draws.standard_normal(found.shape).astype(np.float32)}

    return run


def expected(model: hf.BertForMaskedLM) -> tuple[float, float]:
    """Perplexity and accuracy of hidden tokens, by transformers' loss."""
    loss, right, count = 0.0, 0, 0
    for text, places in zip(TEXTS, hidden_places(TEXTS, 0), strict=True):
        ids, labels = torch.tensor([text.ids]), torch.full((1, len(text.ids)), -100)
        labels[0, places] = ids[0, places]
        ids[0, places] = MASK
        with torch.no_grad():
            found = model(input_ids=ids, labels=labels)
        loss += float(found.loss) * len(places)
        right += int((found.logits[0, places].argmax(-1) == labels[0, places]).sum())
        count += len(places)
    return float(np.exp(loss / count)), right / count


def test_loss_and_accuracy_are_transformers(model: hf.BertForMaskedLM) -> None:
    found = measured(SLICE, logits(model))
    perplexity, accuracy = expected(model)
    assert found.ppl_baseline == pytest.approx(perplexity, rel=1e-4)
    assert found.ppl_compiled == found.ppl_baseline
    assert found.scores is not None
    assert found.scores["accuracy"].baseline == pytest.approx(accuracy)
    assert (found.loss, found.kl, found.top1_agreement) == (pytest.approx(1.0), pytest.approx(0.0), 1.0)
    assert found.tokens == sum(len(places) for places in hidden_places(TEXTS, 0))


def test_noise_in_the_compiled_model_is_a_loss(model: hf.BertForMaskedLM) -> None:
    small, large = (measured(SLICE, logits(model), logits(model, noise)) for noise in (0.01, 3.0))
    assert small.loss == pytest.approx(1.0, abs=0.02)
    assert large.loss is not None
    assert large.loss > 1.1
    assert large.kl is not None
    assert large.kl > 0.1


def test_the_same_tokens_are_hidden_from_both(model: hf.BertForMaskedLM) -> None:
    seen: dict[str, list[Any]] = {"dense": [], "compiled": []}

    def watching(name: str) -> Any:
        run = logits(model)

        def watched(feeds: Mapping[str, Any]) -> Any:
            seen[name].append(feeds["input_ids"].tolist())
            return run(feeds)

        return watched

    measured(SLICE, watching("dense"), watching("compiled"))
    assert seen["dense"] == seen["compiled"]
    assert sum(row.count(MASK) for (row,) in seen["dense"]) == sum(map(len, hidden_places(TEXTS, 0)))


def test_a_share_of_what_is_text_is_hidden() -> None:
    for text, places in zip(TEXTS, hidden_places(TEXTS, 0), strict=True):
        assert len(places) == max(1, round(MASKED_SHARE * (len(text.ids) - 2)))
        assert not any(text.special[place] for place in places)
    again, other = (list(map(list, hidden_places(TEXTS, seed))) for seed in (0, 1))
    assert again == list(map(list, hidden_places(TEXTS, 0)))
    assert again != other
