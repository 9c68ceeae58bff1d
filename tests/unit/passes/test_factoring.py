"""Factors are the best of their rank in the metric asked for, and ranks are the best for their budget."""

from __future__ import annotations

import itertools

import pytest
import torch

from compile_sparse.compiler.errors import ModelError
from compile_sparse.passes.factoring.allocation import Choices, allocate, uniform_rank
from compile_sparse.passes.factoring.factors import factor

SHAPES = [(12, 20), (20, 12), (16, 16)]
DAMPED = 4e-3
"""Both metrics are damped by 1e-6 of their mean eigenvalue, about 20: 2e-3 of the smallest, 1e-2."""
METRICS = [(False, False), (True, False), (False, True), (True, True)]


def _problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight and two metrics far from the identity (condition number about 1e4)."""
    generator = torch.Generator().manual_seed(seed)

    def metric(size: int) -> torch.Tensor:
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
        return basis @ torch.diag(torch.logspace(-2, 2, size, dtype=torch.float64)) @ basis.T

    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, metric(columns), metric(rows)


def _symmetric_root(metric: torch.Tensor | None, size: int) -> torch.Tensor:
    if metric is None:
        return torch.eye(size, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(metric)
    return vectors @ torch.diag(values.sqrt()) @ vectors.T


def _missed(error: torch.Tensor, inputs: torch.Tensor | None, outputs: torch.Tensor | None) -> float:
    """``tr(G E C E^T)``, written out."""
    left = error if outputs is None else outputs @ error
    right = error.T if inputs is None else inputs @ error.T
    return float(torch.trace(left @ right))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("with_inputs", "with_outputs"), METRICS)
def test_full_rank_is_the_weight(rows, columns, with_inputs, with_outputs):
    weight, inputs, outputs = _problem(rows, columns)
    found = factor(
        weight, input_metric=inputs if with_inputs else None, output_metric=outputs if with_outputs else None
    )
    # Roots of metrics with condition number 1e4 (1e2 each): 1e-16 * 1e2 * a few dozen operations.
    torch.testing.assert_close(found.outer @ found.inner, weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("with_inputs", "with_outputs"), METRICS)
def test_no_matrix_of_the_rank_misses_less(rows, columns, with_inputs, with_outputs):
    weight, inputs, outputs = _problem(rows, columns)
    inputs, outputs = inputs if with_inputs else None, outputs if with_outputs else None
    found = factor(weight, input_metric=inputs, output_metric=outputs)
    assert found.energies.shape == (min(rows, columns),)
    roots = [_symmetric_root(m, size) for m, size in ((outputs, rows), (inputs, columns))]
    exact = torch.linalg.svdvals(roots[0] @ weight @ roots[1]).square()
    generator = torch.Generator().manual_seed(1)
    for rank in (1, 4, 9):
        best = found.truncated(rank)
        missed = _missed(weight - best.outer @ best.inner, inputs, outputs)
        assert missed == pytest.approx(float(found.energies[rank:].sum()), rel=DAMPED)
        assert missed == pytest.approx(float(exact[rank:].sum()), rel=DAMPED)
        for _ in range(20):  # small and large steps away, in both factors
            for size in (1e-3, 1e-1, 1.0):
                inner = best.inner * (
                    1 + size * torch.randn(best.inner.shape, generator=generator, dtype=torch.float64)
                )
                outer = best.outer * (
                    1 + size * torch.randn(best.outer.shape, generator=generator, dtype=torch.float64)
                )
                assert _missed(weight - outer @ inner, inputs, outputs) >= missed * (1 - DAMPED)


def test_metrics_change_the_answer():
    """The plain decomposition is worse in the metric than the one made for it, and the other way round."""
    weight, inputs, outputs = _problem(12, 20)
    plain, aware = factor(weight).truncated(4), factor(weight, input_metric=inputs, output_metric=outputs).truncated(4)
    error = [weight - each.outer @ each.inner for each in (plain, aware)]
    assert _missed(error[1], inputs, outputs) < 0.5 * _missed(error[0], inputs, outputs)
    assert _missed(error[0], None, None) < _missed(error[1], None, None)


def test_plain_factors_are_the_truncated_singular_value_decomposition():
    weight = _problem(12, 20)[0]
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    found = factor(weight).truncated(5)
    torch.testing.assert_close(found.outer @ found.inner, left[:, :5] * values[:5] @ right[:5], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.energies, values.square(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_components_are_shared_evenly(rows, columns):
    weight, inputs, outputs = _problem(rows, columns)
    found = factor(weight, input_metric=inputs, output_metric=outputs)
    deviations = torch.einsum("rk,kl,rl->r", found.inner, inputs, found.inner).sqrt()
    torch.testing.assert_close(deviations, found.energies.pow(0.25), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_text_that_never_takes_a_direction_is_no_obstacle(rows, columns):
    """Metrics of low rank, with the rounding of float32 products: the whole weight is still representable."""
    generator = torch.Generator().manual_seed(0)
    weight = _problem(rows, columns)[0]
    few = torch.randn(3, columns, generator=generator)
    gradients = torch.randn(2, rows, generator=generator)
    found = factor(weight, input_metric=(few.T @ few).double(), output_metric=(gradients.T @ gradients).double())
    assert bool(found.inner.isfinite().all()) and bool(found.outer.isfinite().all())
    # Roots are damped by 1e-6 of the mean: condition number 1e3 each.
    torch.testing.assert_close(found.outer @ found.inner, weight, rtol=0, atol=1e-9)
    cut = found.truncated(2)  # as many components as gradients: nothing the loss saw is missed
    error = weight - cut.outer @ cut.inner
    assert (gradients.double() @ error @ few.double().T).abs().max() < 1e-4 * weight.abs().max()


def test_a_layer_the_text_never_reaches_is_decomposed_plainly():
    weight = _problem(12, 20)[0]
    dead = factor(weight, input_metric=torch.zeros(20, 20), output_metric=torch.zeros(12, 12))
    torch.testing.assert_close(dead.energies, factor(weight).energies)


@pytest.mark.parametrize("where", ["weight", "input_metric", "output_metric"])
def test_what_is_not_finite_is_refused(where):
    weight, inputs, outputs = _problem(12, 20)
    values = {"weight": weight, "input_metric": inputs, "output_metric": outputs}
    values[where][0, 0] = torch.nan
    with pytest.raises(ModelError, match="CS2503") as caught:
        factor(**values, where="layer.weight")
    assert caught.value.where == "layer.weight"


def _random_choices(seed: int) -> tuple[dict[str, Choices], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    choices = {"a": Choices(8, 8, range(1, 4)), "b": Choices(12, 6, range(1, 4)), "c": Choices(6, 10, range(1, 4))}
    energies = {
        name: torch.rand(min(c.rows, c.columns), generator=generator).sort(descending=True).values * 10.0**place
        for place, (name, c) in enumerate(choices.items())
    }
    return choices, energies


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.4])
def test_allocation_meets_the_budget_and_is_near_the_best(seed, fraction):
    choices, energies = _random_choices(seed)
    total = sum(each.dense for each in choices.values())

    def parameters(ranks) -> int:
        return sum(choices[name].parameters(rank) for name, rank in ranks.items())

    def missed(ranks) -> float:
        return sum(float(energies[name][rank:].sum()) for name, rank in ranks.items() if rank is not None)

    found = allocate(choices, energies, fraction)
    assert parameters(found) <= (1 - fraction) * total

    every = [dict(zip(choices, ranks, strict=True)) for ranks in itertools.product(*([1, 2, 3, None] for _ in choices))]
    best = min(missed(each) for each in every if parameters(each) <= (1 - fraction) * total)
    # On its own budget, the greedy answer is at worst one hull step of each layer away; here that is bounded by brute force
    # over the budgets between what it used and the next step.
    assert missed(found) >= best - 1e-9
    widest = max(each.parameters(None) - each.parameters(1) for each in choices.values())
    reachable = (1 - fraction) * total - widest
    bound = min((missed(each) for each in every if parameters(each) <= reachable), default=float("inf"))
    assert missed(found) <= bound + 1e-9


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.7])
def test_allocation_is_exact_where_every_step_costs_the_same(seed, fraction):
    """Weights of one shape whose energies fall fast: going dense costs as much as one more rank, and steps only save less."""
    generator = torch.Generator().manual_seed(seed)
    choices = dict.fromkeys("abc", Choices(12, 12, range(1, 6)))
    decay, size = 0.2 + 0.25 * torch.rand(3, generator=generator), 10 ** torch.rand(3, generator=generator)
    energies = {name: size[i] * decay[i] ** torch.arange(12) for i, name in enumerate(choices)}

    def missed(ranks) -> float:
        return sum(float(energies[name][rank:].sum()) for name, rank in ranks.items() if rank is not None)

    room = (1 - fraction) * 3 * 144
    every = [
        dict(zip(choices, ranks, strict=True)) for ranks in itertools.product(*([*range(1, 6), None] for _ in choices))
    ]
    affordable = [each for each in every if sum(choices[n].parameters(r) for n, r in each.items()) <= room]
    assert missed(allocate(choices, energies, fraction)) == pytest.approx(min(map(missed, affordable)), rel=1e-5)


def test_allocation_spends_where_it_saves_most():
    choices = {"cheap": Choices(16, 16, range(1, 8)), "dear": Choices(16, 16, range(1, 8))}
    flat = torch.ones(16)
    found = allocate(choices, {"cheap": flat * 1e-3, "dear": flat}, 0.25)
    assert found["dear"] is None
    assert found["cheap"] == 4  # (384 - 256) // 32


def test_a_budget_below_the_lowest_ranks_is_out_of_reach():
    choices = {"a": Choices(16, 16, range(4, 8))}
    assert allocate(choices, {"a": torch.ones(16)}, 0.6) is None
    assert allocate(choices, {"a": torch.ones(16)}, 0.5) == {"a": 4}


@pytest.mark.parametrize(
    ("ranks", "fraction", "rank"),
    [
        (range(1, 8), 0.25, 6),  # 0.75 * 256 / 32
        (range(4, 8, 4), 0.25, None),  # rank 4 would remove half
        (range(4, 8, 4), 0.45, 4),
        (range(2, 8, 2), 0.6875, 2),  # 2.5: nearest
        (range(2, 8, 2), 0.625, 4),  # 3: a tie keeps more
        (range(4, 8, 4), 0.9, 4),  # as low as it goes
    ],
)
def test_uniform_ranks(ranks, fraction, rank):
    assert uniform_rank(Choices(16, 16, ranks), fraction) == rank
