"""The clock: rounds alternate, warm-up is not measured, and drift hits every form alike."""

from __future__ import annotations

import pytest

from compile_sparse.compiler.microbench.timing import alternate
from compile_sparse.compiler.verify.statistics import ratio_of_rounds


class Machine:
    """A machine whose speed changes as it works; each runner notes when it ran, and how often."""

    def __init__(self, *, drift: float = 0.0):
        self.now, self.drift, self.log = 0.0, drift, []

    def runner(self, name, cost):
        machine = self

        class Runner:
            mode = "graph"

            def seconds(self, runs):
                machine.log.append((name, runs))
                per_call = cost * (1 + machine.drift * machine.now)
                machine.now += per_call * runs
                return per_call

        return Runner()


def test_order_turns_around_and_warm_up_is_not_measured():
    machine = Machine()
    times = alternate({"a": machine.runner("a", 0.001), "b": machine.runner("b", 0.002)}, rounds=3, least_seconds=0.01)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    warm_up, measured = machine.log[:6], machine.log[6:]
    assert [name for name, _ in warm_up] == ["a"] * 3 + ["b"] * 3
    assert [name for name, _ in measured] == ["a", "b", "b", "a", "a", "b"]


def test_a_round_lasts_long_enough_and_not_for_ever():
    machine = Machine()
    alternate({"a": machine.runner("a", 0.003), "b": machine.runner("b", 1e-12)}, rounds=1, least_seconds=0.01)
    runs = dict(machine.log[-2:])
    assert runs["a"] == 4  # 0.01 / 0.003, up
    assert runs["b"] == 10_000


def test_drift_does_not_look_like_a_gain():
    machine = Machine(drift=2.0)  # twice as slow after half a second
    same = {name: machine.runner(name, 0.001) for name in ("a", "b")}
    times = alternate(same, rounds=6, least_seconds=0.02)
    assert times["a"][-1] > 1.3 * times["a"][0], "the machine did drift"
    ratio = ratio_of_rounds(times["a"], times["b"])
    assert ratio.low < 1 < ratio.high
    assert ratio.value == pytest.approx(1, abs=0.02)


def test_no_rounds_are_an_error():
    with pytest.raises(ValueError, match="at least one"):
        alternate({}, rounds=0)
