"""Candidates and their combination, on an architecture that is a few lines of arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

from compile_sparse.backends.checkpoint.candidates import Cache, Change, candidates, sliced_lists
from compile_sparse.backends.checkpoint.search import matching
from compile_sparse.backends.checkpoint.tensors import Stack

CONFIG = {"width": 64, "heads": 8, "groups": 4, "mlp": 88, "limit": 64, "flag": True, "part_config": {"deep": 88}}


def shapes_of(some: Sequence[Change], unchecked: bool) -> dict[str, tuple[int, ...]]:
    values = CONFIG | {change.path[0]: change.new for change in some if len(change.path) == 1}
    heads, groups = values["heads"], values["groups"]
    return {"fused": ((heads + 2 * groups) * 8, values["width"]), "up": (values["mlp"], values["width"]), "b": (heads,)}


def test_candidates_divide_what_changed() -> None:
    found = candidates(CONFIG, {(88, 66)}, (), Cache())
    assert {(change.path, change.new) for change in found} == {
        (("heads",), 6),
        (("groups",), 3),
        (("mlp",), 66),
        (("part_config", "deep"), 66),
    }


def test_the_size_of_a_cached_head_is_a_fact() -> None:
    heads = frozenset({9})
    assert not candidates({"head_dim": 8}, {(64, 48)}, (), Cache(heads, 8))
    assert candidates({"head_dim": 8}, {(64, 48)}, (), Cache(heads, 6)) == [Change(("head_dim",), 8, 6)]


def test_the_number_of_cached_heads_is_a_fact() -> None:
    # 6 and 3 heads of 8 in one tensor of (6 + 2 * 3) * 8 rows; 2 and 2 are left. No ratio gives 3 to 2.
    found = candidates({"heads": 6, "groups": 3}, {(96, 48), (48, 16)}, (), Cache(frozenset({2}), 8))
    assert Change(("groups",), 3, 2) in found
    assert Change(("heads",), 6, 2) in found


def test_concatenated_parts_add() -> None:
    # (8 + 2 * 4) * 8 = 128 rows; 6 heads and 3 groups leave 96, 6 heads alone 112.
    for heads, groups in ((6, 3), (6, 4), (8, 3)):
        wanted = {"fused": ((heads + 2 * groups) * 8, 64), "up": (88, 64), "b": (heads,)}
        changes = [Change(("heads",), 8, 6), Change(("groups",), 4, 3), Change(("limit",), 64, 48)]
        first = next(matching(changes, wanted, shapes_of))
        assert {change.path[0]: change.new for change in first} == {
            **({"heads": 6} if heads == 6 else {}),
            **({"groups": 3} if groups == 3 else {}),
        }


def test_fields_that_no_shape_shows_come_last() -> None:
    changes = [Change(("limit",), 64, 48), Change(("mlp",), 88, 66)]
    found = list(matching(changes, {"up": (66, 64)}, shapes_of))
    assert found == [(changes[1],), tuple(changes)]


def test_only_sets_that_can_be_right_are_built() -> None:
    built: list[int] = []

    def counting(some: Sequence[Change], unchecked: bool) -> dict[str, tuple[int, ...]]:
        built.append(len(some))
        return shapes_of(some, unchecked)

    changes = [Change((name,), CONFIG[name], 1) for name in ("width", "heads", "groups", "mlp")]
    changes.append(Change(("mlp",), 88, 66))
    next(matching(changes, {"up": (66, 1), "b": (8,)}, counting))
    assert built == [0, 1, 1, 1, 1, 1, 2]


def test_lists_follow_the_blocks() -> None:
    config = {"kinds": ["a", "b", "c"], "pair": [1, 2], "text_config": {"kinds": [1, 2, 3]}}
    assert sliced_lists(config, [Stack("layers", 3, (0, 2))]) == {
        ("kinds",): ["a", "c"],
        ("text_config", "kinds"): [1, 3],
    }
    # Two stacks of one size that lost different blocks: nothing says which one a list belongs to.
    assert not sliced_lists(config, [Stack("encoder", 3, (0, 2)), Stack("decoder", 3, (0, 1))])
