"""``LastComputed``: one result is kept, and freed before the next is made."""

from __future__ import annotations

import weakref

from compile_sparse.compiler.ir.weights import LastComputed


class Result:
    """Something whose life can be watched."""


def test_the_last_result_is_made_once_and_freed_before_the_next() -> None:
    memory: LastComputed[Result] = LastComputed()
    made: list[weakref.ref[Result]] = []

    def compute() -> Result:
        assert all(reference() is None for reference in made)
        result = Result()
        made.append(weakref.ref(result))
        return result

    assert memory.get("a", compute) is memory.get("a", compute)
    assert len(made) == 1
    memory.get("b", compute)
    memory.get("a", compute)  # computed again, not the other's
    assert len(made) == 3
