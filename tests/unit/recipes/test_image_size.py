"""Sizes of images, as recipes and the command line write them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.recipes.building import Building
from compile_sparse.compiler.recipes.flags import merge_options


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("224", (224, 224)),
        (96, (96, 96)),
        ("64x96", (64, 96)),
        ("64X96", (64, 96)),
        ([64, 96], (64, 96)),
        ([32], (32, 32)),
    ],
)
def test_sizes_of_images(written: Any, size: tuple[int, int]) -> None:
    assert Building.model_validate({"image_size": written}).image_size == size
    assert merge_options(image_size=written).building.image_size == size


@pytest.mark.parametrize(
    "written", ["", "x", "64x", "64x96x3", "a", "-1", "0", "1e2", "²", 0, -4, 9000, 1.5, True, [], [1, 2, 3], "64x9000"]
)
def test_sizes_that_are_none(written: Any) -> None:
    with pytest.raises(ValidationError):
        Building.model_validate({"image_size": written})
    with pytest.raises(UsageError):
        merge_options(image_size=written)
