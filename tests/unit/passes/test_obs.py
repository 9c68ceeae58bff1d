"""Greedy OBS selection and the refit it assumes, against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from compile_sparse.compiler.errors import ModelError
from compile_sparse.passes.pruning.obs import DAMPING, DELAYED, FLOOR, Consumer, removal_order
from compile_sparse.passes.reconstruction.regression import Regression


def layer(inputs: int, outputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and correlated inputs ``[T, K]``."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(400, inputs, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64), x


def refitted_error(weight: torch.Tensor, second: torch.Tensor, kept: list[int]) -> float:
    """``min_V tr((W - V) C (W - V)^T)`` over ``V`` supported on ``kept``, solved directly."""
    solution = torch.linalg.solve(second[kept][:, kept], second[kept] @ weight.t())
    full = torch.zeros_like(weight)
    full[:, kept] = solution.t()
    missing = weight - full
    return float((missing @ second * missing).sum())


def damped(x: torch.Tensor) -> torch.Tensor:
    second = x.t() @ x
    floor = FLOOR * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)
    return second + DAMPING * torch.diag(second.diagonal()) + floor


@pytest.mark.parametrize("width", [1, 3])
def test_each_step_is_the_best_single_removal_and_costs_what_refitting_leaves(width: int) -> None:
    units, remove = 6, 3
    weight, x = layer(units * width, 5, seed=width)
    index = torch.arange(units * width) // width
    second = damped(x)
    removal = removal_order([Consumer(weight.t() @ weight, x.t() @ x, index)], units, remove)
    kept = list(range(units))
    before = 0.0
    for unit, cost in zip(removal.order.tolist(), removal.cost.tolist(), strict=True):
        errors = {u: refitted_error(weight, second, columns(kept, u, width)) for u in kept}
        assert unit == min(errors, key=errors.__getitem__)
        assert cost == pytest.approx(errors[unit] - before, rel=1e-6)
        before = errors[unit]
        kept.remove(unit)


def columns(kept: list[int], without: int, width: int) -> list[int]:
    return [u * width + i for u in kept if u != without for i in range(width)]


@pytest.mark.parametrize("remove", [5, DELAYED + 1, 2 * DELAYED + 20])
def test_delayed_updates_are_greedy_removal_from_scratch(remove: int) -> None:
    """Against tables that are inverted anew after every removal, well beyond the length of one delayed block."""
    size = 3 * DELAYED
    weight, x = layer(size, 7, seed=8)
    x[0] *= 1e3  # one row as large as the first token of a text
    second = damped(x)
    told: list[int] = []
    consumer = Consumer(weight.t() @ weight, x.t() @ x, torch.arange(size))
    removal = removal_order([consumer], size, remove, advance=told.append)
    kept = torch.arange(size)
    for unit, cost in zip(removal.order.tolist(), removal.cost.tolist(), strict=True):
        refitted = torch.linalg.solve(second[kept][:, kept], second[kept] @ weight.t())
        costs = refitted.square().sum(1) / torch.linalg.inv(second[kept][:, kept]).diagonal()
        assert unit == int(kept[costs.argmin()])
        assert cost == pytest.approx(float(costs.min()), rel=1e-6)
        kept = kept[kept != unit]
    assert sum(told) == remove


def test_consumers_of_one_axis_count_together() -> None:
    """Two layers that read the same units with inputs of their own, against the sum of what each would cost."""
    (first, x), (second, y) = layer(10, 4, seed=9), layer(10, 6, seed=10)
    both = [Consumer(w.t() @ w, z.t() @ z, torch.arange(10)) for w, z in ((first, x), (second, y))]
    removal = removal_order(both, 10, 1)
    costs = [
        sum(refitted_error(w, damped(z), columns(list(range(10)), unit, 1)) for w, z in ((first, x), (second, y)))
        for unit in range(10)
    ]
    assert int(removal.order[0]) == min(range(10), key=costs.__getitem__)
    assert float(removal.cost[0]) == pytest.approx(min(costs), rel=1e-6)


def test_the_scale_of_an_input_does_not_matter() -> None:
    """Nor that of a few rows: a thousandfold input, with weights that take it back, is removed in the same turn."""
    weight, x = layer(12, 5, seed=11)
    scale = torch.ones(12, dtype=torch.float64)
    scale[3] = 1e3
    orders = [
        removal_order([Consumer(w.t() @ w, z.t() @ z, torch.arange(12))], 12, 8).order
        for w, z in ((weight, x), (weight / scale, x * scale))
    ]
    assert torch.equal(*orders)


def test_greedy_is_near_the_best_subset() -> None:
    weight, x = layer(8, 4, seed=3)
    second = damped(x)
    removal = removal_order([Consumer(weight.t() @ weight, x.t() @ x, torch.arange(8))], 8, 3)
    errors = sorted(refitted_error(weight, second, list(kept)) for kept in itertools.combinations(range(8), 5))
    assert float(removal.cost.sum()) <= errors[len(errors) // 10]


def test_quota_takes_equally_many_from_every_outer_position() -> None:
    weight, x = layer(12, 5, seed=4)
    quota = torch.arange(12) // 4
    removal = removal_order([Consumer(weight.t() @ weight, x.t() @ x, torch.arange(12))], 12, 6, quota=quota)
    assert torch.bincount(quota[removal.order], minlength=3).tolist() == [2, 2, 2]
    assert torch.bincount(quota[removal.order[:3]], minlength=3).tolist() == [1, 1, 1]


def test_values_that_are_not_finite_are_an_error() -> None:
    weight, x = layer(6, 4, seed=7)
    x[0, 0] = torch.inf
    with pytest.raises(ModelError) as caught:
        removal_order([Consumer(weight.t() @ weight, x.t() @ x, torch.arange(6))], 6, 2)
    assert caught.value.code == "CS2503"
    regression = Regression(6, 4, intercept=False)
    regression.add(x, torch.zeros(400, 4))
    with pytest.raises(ModelError) as caught:
        regression.solve()
    assert caught.value.code == "CS2503"


def test_regression_equals_the_normal_equations() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(300, 7, generator=generator)
    truth, shift = torch.randn(4, 7, generator=generator), torch.randn(4, generator=generator)
    r = x @ truth.t() + shift + 0.1 * torch.randn(300, 4, generator=generator)
    regression = Regression(7, 4, intercept=True)
    for part in torch.arange(300).split(70):
        regression.add(x[part], r[part])
    found = regression.solve([0.0])
    assert found.weight is not None
    assert found.bias is not None
    ones = torch.cat([x, torch.ones(300, 1)], 1).double()
    wanted = torch.linalg.lstsq(ones, r.double()).solution
    # float32 products of 300 rows: about 300 * 6e-8 relative to the largest sum.
    torch.testing.assert_close(torch.cat([found.weight, found.bias[:, None]], 1), wanted.t(), rtol=1e-4, atol=1e-4)
    missing = r.double() - ones @ wanted
    assert found.left / found.missing == pytest.approx(
        float(missing.square().sum() / r.double().square().sum()), rel=1e-3
    )


def test_rows_count_by_their_weights() -> None:
    """Against least squares on rows that stand there as often as they count."""
    generator = torch.Generator().manual_seed(12)
    x = torch.randn(60, 4, generator=generator)
    r = x @ torch.randn(4, 3, generator=generator) + torch.randn(60, 3, generator=generator) + 2.0
    times = torch.randint(1, 5, (60,), generator=generator)
    regression = Regression(4, 3, intercept=True)
    for part in (slice(0, 35), slice(35, 60)):
        regression.add(x[part], r[part], times[part, None].float())
    change = regression.solve([0.0])
    assert change.weight is not None and change.bias is not None
    repeated = torch.cat([x, torch.ones(60, 1)], 1).repeat_interleave(times, 0).double()
    wanted = torch.linalg.lstsq(repeated, r.repeat_interleave(times, 0).double()).solution
    torch.testing.assert_close(torch.cat([change.weight, change.bias[:, None]], 1), wanted.t(), rtol=1e-4, atol=1e-5)
    shift = regression.mean_shift().bias
    torch.testing.assert_close(shift, r.repeat_interleave(times, 0).double().mean(0), rtol=1e-5, atol=1e-5)


def test_mean_shift_is_the_mean() -> None:
    generator = torch.Generator().manual_seed(6)
    x, r = torch.randn(50, 3, generator=generator), torch.randn(50, 2, generator=generator) + 3.0
    regression = Regression(3, 2, intercept=True)
    regression.add(x, r)
    found = regression.mean_shift()
    assert found.weight is None
    torch.testing.assert_close(found.bias, r.double().mean(0), rtol=1e-5, atol=1e-5)
    assert found.left / found.missing == pytest.approx(
        float((r - r.mean(0)).double().square().sum() / r.double().square().sum()), rel=1e-4
    )


def test_unexcited_inputs_keep_their_weights() -> None:
    x = torch.zeros(20, 3)
    x[:, 0] = torch.linspace(-1, 1, 20)
    regression = Regression(3, 2, intercept=False)
    regression.add(x, torch.ones(20, 2) * x[:, :1])
    change = regression.solve([1e-6]).weight
    assert change is not None
    assert float(change[:, 1:].abs().max()) < 1e-12
    torch.testing.assert_close(change[:, 0], torch.ones(2, dtype=torch.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [40, 100, 4000])
def test_too_little_text_changes_little_or_nothing(rows: int) -> None:
    """64 inputs, noise only: a plain fit would explain most of 40 rows and hurt everywhere else."""
    generator = torch.Generator().manual_seed(rows)
    x, r = torch.randn(rows, 64, generator=generator), torch.randn(rows, 8, generator=generator)
    regression = Regression(64, 8, intercept=False)
    regression.add(x, r)
    change = regression.solve().weight
    added = 0.0 if change is None else float(change.square().sum() / 8)  # per output, on fresh inputs of unit variance
    assert added < 0.2  # the plain fit of 40 rows has about 40 / 24 = 1.7
