"""The reference methods of the quality benchmark do what their papers say, on a random Llama."""

from __future__ import annotations

import copy
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from quality_references import channels_and_heads, layers, low_rank, slicegpt, width
from quality_references.evaluation import Evaluator, equal_windows
from quality_references.registry import REFERENCES
from quality_references.solve import DAMPING, damped, greedy_obs, refit
from quality_references.structures import kv_groups, mlp_channels
from quality_references.table import missed
from quality_references.walk import LayerWalk

EXACT = 2e-5  # float32 logits of order 1 through three layers whose sums have fewer than 100 terms


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.fixture
def model(dense: LlamaForCausalLM) -> LlamaForCausalLM:
    return copy.deepcopy(dense)


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(64, (16, 24), generator=torch.Generator().manual_seed(1))


def logits(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("of", [mlp_channels, kv_groups])
def test_removing_pieces_equals_zeroing_what_reads_them(dense, model, windows, of) -> None:
    masked = copy.deepcopy(dense)
    for layer, other in zip(model.model.layers, masked.model.layers, strict=True):
        structure, kept = of(layer), torch.tensor([0, 2, 3])
        gone = torch.ones(structure.count, dtype=torch.bool)
        gone[kept] = False
        of(other).consumer.weight.data[:, structure.columns[gone].flatten()] = 0
        structure.keep(kept)
    torch.testing.assert_close(logits(model, windows), logits(masked, windows), atol=EXACT, rtol=0)


def test_the_walk_sees_the_inputs_that_the_model_sees(model, windows) -> None:
    seen: list[torch.Tensor] = []
    down = model.model.layers[2].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits(model, windows)
    hook.remove()
    walk = LayerWalk(model, windows)
    for layer in model.model.layers[:2]:
        walk.advance(layer)
    (moments,) = walk.observe(model.model.layers[2], [down])
    x = seen[0].flatten(0, 1).double()
    scale = float(x.square().sum(0).max())
    torch.testing.assert_close(moments.gram, x.T @ x, atol=1e-5 * scale, rtol=0)
    torch.testing.assert_close(moments.variances, x.var(0, correction=0), atol=1e-5 * scale / len(x), rtol=0)


def test_refit_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(200, 10, generator=generator, dtype=torch.float64) @ torch.randn(10, 10, dtype=torch.float64)
    weight, kept = torch.randn(6, 10, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 4, 5, 8, 9])
    exact = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    fitted = refit(weight, x.T @ x, kept)
    # The damping bounds how far the solution may be from the undamped one, relative to the loss.
    loss, best = ((x @ weight.T - x[:, kept] @ w.T).square().sum() for w in (fitted, exact))
    assert best <= loss <= best + DAMPING * x.square().mean() * len(x) * exact.square().sum()


@pytest.mark.parametrize("size", [1, 2])
def test_greedy_obs_removes_the_cheapest_and_ends_at_the_refit(size: int) -> None:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    x = torch.randn(100, 8, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    groups = torch.arange(8).view(-1, size)
    gram = x.T @ x

    def loss(kept: torch.Tensor) -> float:
        columns = groups[kept].flatten()
        left = torch.zeros_like(weight)
        left[:, columns] = weight @ damped(gram)[:, columns] @ torch.linalg.inv(damped(gram)[columns][:, columns])
        difference = left - weight
        return float((difference @ damped(gram) * difference).sum())

    kept, updated = greedy_obs(weight, gram, groups, 1)
    candidates = [torch.tensor(c) for c in combinations(range(len(groups)), len(groups) - 1)]
    assert kept.tolist() == min(candidates, key=loss).tolist()
    kept, updated = greedy_obs(weight, gram, groups, 2)
    columns = groups[kept].flatten()
    expected = weight @ damped(gram)[:, columns] @ torch.linalg.inv(damped(gram)[columns][:, columns])
    torch.testing.assert_close(updated[:, columns], expected)
    assert updated.count_nonzero() == updated.shape[0] * len(columns)


def test_slicing_nothing_changes_nothing(dense, model, windows) -> None:
    slicegpt.slice_model(model, windows, 32, slice_head=True)
    torch.testing.assert_close(logits(model, windows), logits(dense, windows), atol=10 * EXACT, rtol=0)


def test_sliced_streams_are_the_principal_components(model, windows) -> None:
    hidden = LayerWalk(model, windows).hidden
    basis = slicegpt._components(hidden, 5)
    x = torch.cat(hidden).flatten(0, 1)
    kept = (x @ basis).square().sum()
    torch.testing.assert_close(kept, torch.linalg.svdvals(x)[:5].square().sum(), rtol=1e-4, atol=0)


def test_each_basis_is_of_the_stream_that_the_slicing_before_it_leaves(dense, model, windows) -> None:
    slicegpt.slice_model(model, windows, 20, slice_head=True)
    walk, layer = LayerWalk(dense, windows), dense.model.layers[0]
    (stream,) = walk.hidden
    first = slicegpt._components([stream], 20)
    with torch.no_grad():
        stream = stream @ first @ first.T
        stream = stream + walk.attend(layer.self_attn, layer.input_layernorm(stream))
        middle = slicegpt._components([stream], 20)
        stream = stream @ middle @ middle.T
        stream = stream + layer.mlp(layer.post_attention_layernorm(stream))
    after = slicegpt._components([stream], 20)
    found = model.model.layers[0]
    # Eigenvectors have no sign, so compare what does not depend on it.
    torch.testing.assert_close(found.after_attention.detach().abs(), (first.T @ middle).abs(), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.after_mlp.detach().abs(), (middle.T @ after).abs(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("slice_head", [False, True])
def test_equal_parameters_are_equal(dense, model, windows, slice_head: bool) -> None:
    config = dense.config
    allowed = width.parameters_after_indices(dense)
    narrowed = copy.deepcopy(dense)
    width.magnitude(narrowed, windows)
    assert sum(p.numel() for p in narrowed.parameters()) == allowed
    slicegpt.at_equal_parameters(model, windows, slice_head=slice_head)
    left = sum(p.numel() for p in model.parameters())
    one_wider = 2 * config.vocab_size + 4 * 32 * config.hidden_size * config.num_hidden_layers
    assert allowed - one_wider < left <= allowed
    assert logits(model, windows).isfinite().all()


def test_full_rank_is_exact_and_whitening_is_the_best_of_its_rank(dense, model, windows, monkeypatch) -> None:
    linear = dense.model.layers[0].mlp.down_proj
    (moments,) = LayerWalk(dense, windows).observe(dense.model.layers[0], [linear])
    weight = linear.weight.detach().double()

    def error(factors: tuple[torch.Tensor, torch.Tensor]) -> float:
        difference = factors[0] @ factors[1] - weight
        return float((difference @ moments.gram * difference).sum())

    # Eckart-Young for W C: the squared singular values that are cut off.
    cut = torch.linalg.svdvals(weight @ torch.linalg.cholesky(damped(moments.gram)))[8:].square().sum()
    found = error(low_rank.whitened(weight, moments, 8))
    assert found <= float(cut) * (1 + 1e-9)
    assert found >= float(cut) * 0.9  # what is damped counts in the bound and not in the error
    assert found < error(low_rank.scaled(weight, moments, 8))
    assert found < error(low_rank.plain(weight, moments, 8))
    monkeypatch.setattr(low_rank, "_rank", lambda linear: min(linear.weight.shape))
    low_rank.svd_llm_sequential(model, windows)
    torch.testing.assert_close(logits(model, windows), logits(dense, windows), atol=10 * EXACT, rtol=0)


def test_depth_removes_a_layer_that_does_nothing(model, windows) -> None:
    for linear in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        nn.init.zeros_(linear.weight)
    for method in (layers.block_influence, layers.angular_block):
        shallow = copy.deepcopy(model)
        assert method(shallow, windows)["removed"] == [2]
        torch.testing.assert_close(logits(shallow, windows), logits(model, windows), atol=EXACT, rtol=0)


def test_greedy_depth_removes_what_the_loss_needs_least(dense, model, windows) -> None:
    losses = []
    for index in range(4):
        shallow = copy.deepcopy(dense)
        layers._drop(shallow, [index])
        losses.append(shallow(input_ids=windows, labels=windows, use_cache=False).loss.item())
    assert layers.greedy_perplexity(model, windows)["removed"] == [losses.index(min(losses))]


def test_replaced_layers_are_the_least_squares_map(dense, model, windows) -> None:
    (removed,) = layers.replace_me(model, windows)["removed"]
    outputs: list[torch.Tensor] = []
    hook = dense.model.layers[removed - 1].mlp.register_forward_hook(lambda m, i, output: outputs.append(output))
    states = [state.flatten(0, 1).double() for state in layers._states(dense, windows)]
    hook.remove()
    mlp = torch.cat(outputs).flatten(0, 1).double()
    wanted = states[removed + 1] - (states[removed] - mlp)
    best = (mlp @ torch.linalg.lstsq(mlp, wanted).solution - wanted).square().sum()
    after = layers._states(model, windows)[removed].flatten(0, 1).double()
    torch.testing.assert_close((after - states[removed + 1]).square().sum(), best, rtol=1e-3, atol=0)


def test_flap_adds_the_mean_of_what_it_removes(dense, model, windows) -> None:
    channels_and_heads.flap(mlp_channels, model, windows)
    first, old = model.model.layers[0].mlp.down_proj, dense.model.layers[0].mlp.down_proj
    walk = LayerWalk(dense, windows)
    (full,) = walk.observe(dense.model.layers[0], [old])
    (left,) = LayerWalk(model, windows).observe(model.model.layers[0], [first])
    before = old.weight.double() @ (full.total / full.tokens)
    after = first.weight.double() @ (left.total / left.tokens) + first.bias
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def test_every_reference_runs_and_removes_parameters(dense, windows) -> None:
    before = sum(p.numel() for p in dense.parameters())
    for name, row in REFERENCES.items():
        if "tp" in name.split("-") or name.startswith("width12-slicegpt"):
            continue  # the package is optional; SliceGPT adds parameters at this size
        changed = copy.deepcopy(dense)
        row.run(changed, windows)
        assert sum(p.numel() for p in changed.parameters()) < before, name
        assert logits(changed, windows).isfinite().all(), name


def test_a_model_against_itself_scores_one(dense, model, windows) -> None:
    slices = {"a": windows[:8], "b": windows[8:]}
    evaluator = Evaluator(slices, lambda ids: logits(dense, ids), batch=3)
    same = evaluator(lambda ids: logits(dense, ids))
    assert same["all"]["ratio"] == 1 and same["all"]["top1"] == 1
    assert same["all"]["kl"] == pytest.approx(0, abs=1e-3)  # half-precision log-probabilities
    ids = slices["b"]
    expected = dense(input_ids=ids, labels=ids).loss.exp().item()
    assert evaluator.dense["b"] == pytest.approx(expected, rel=1e-5)
    width.magnitude(model, windows)
    worse = evaluator(lambda ids: logits(model, ids))
    low, high = worse["all"]["ci95"]
    assert low < worse["all"]["ratio"] < high and worse["all"]["kl"] > 0.01
    assert worse["all"]["ppl"] == pytest.approx(worse["all"]["ratio"] * evaluator.dense["all"], rel=1e-9)


def test_windows_are_spread_evenly_to_both_ends() -> None:
    cut = equal_windows(torch.arange(1000), 4, 100)
    assert cut[:, 0].tolist() == [0, 300, 600, 900]
    assert len(equal_windows(torch.arange(1000), 64, 300)) == 3
    with pytest.raises(SystemExit):
        equal_windows(torch.arange(10), 4, 100)


def test_a_reference_that_beats_ours_on_one_slice_is_reported() -> None:
    def row(ours: bool, overall: float, worst: float, parameters: int = 100) -> dict:
        scores = {"all": {"ratio": overall}, "en": {"ratio": worst}}
        return {"kind": "channels", "ours": ours, "parameters": parameters, "scores": scores}

    def found(**rows: dict) -> list[str]:
        return [line for line in missed({"dense": {"parameters": 300}, "rows": rows}) if line.startswith("channels")]

    assert not found(ours=row(True, 1.1, 1.2), theirs=row(False, 1.1, 1.2))
    assert found(ours=row(True, 1.1, 1.2), theirs=row(False, 1.2, 1.1))
    assert found(ours=row(True, 1.1, 1.2), theirs=row(False, 1.0, 1.3))
    assert not found(ours=row(True, 1.1, 1.2), big=row(False, 1.0, 1.0, 200), theirs=row(False, 1.3, 1.3))
    assert found(theirs=row(False, 1.0, 1.0))
