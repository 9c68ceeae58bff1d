"""A quantizer is checked when it is loaded, and a wrong name is answered with the nearest."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from compile_sparse.compiler.errors import EnvironmentFailure, UsageError
from compile_sparse.compiler.extension.quantizer_contract import Quantizer
from compile_sparse.compiler.extension.quantizers import find_quantizer
from compile_sparse.compiler.recipes.flags import merge_options
from compile_sparse.compiler.recipes.recipe import recipe_from_yaml
from compile_sparse.passes.quantization.round_to_nearest import RoundToNearest
from tests.installing import install

GROUP = "compile_sparse.quantizers"


class Gptq(RoundToNearest):
    name: ClassVar[str] = "gptq"


class Nameless(Quantizer):
    def quantize(self, *given: Any, **named: Any) -> Any: ...


class Idle(Quantizer):
    name: ClassVar[str] = "gptq"
    needs_statistics: ClassVar[bool] = True


def test_ours_is_installed() -> None:
    assert isinstance(find_quantizer("rtn"), RoundToNearest)


@pytest.mark.parametrize(
    ("found", "part"),
    [
        (Nameless, "lacks 'name', 'needs_statistics'"),
        (Idle, "lacks 'quantize'"),
        (RoundToNearest, "is called 'rtn'"),
        (object, "no subclass of compile_sparse.compiler.extension.quantizer_contract.Quantizer"),
    ],
)
def test_what_is_no_quantizer_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, found: object, part: str) -> None:
    install(monkeypatch, GROUP, {"gptq": found})
    with pytest.raises(EnvironmentFailure) as caught:
        recipe_from_yaml("passes: [{quantize: {scheme: w8a8, quantizer: gptq}}]").build_passes()
    error = caught.value
    assert error.code == "CS5013" and "'gptq'" in error.what and part in error.why
    assert error.where.startswith("entry point third_party:")


def test_the_flag_and_the_recipe_reach_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, GROUP, {"gptq": Gptq})
    for recipe in (
        merge_options(quantize="w8a8", quantizer="gptq"),
        recipe_from_yaml("passes: [{quantize: {scheme: w8a8, quantizer: gptq}}]"),
    ):
        (step,) = recipe.build_passes()
        assert step.model_dump()["quantizer"] == "gptq"


def test_a_name_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, GROUP, {"gptq": Gptq})
    with pytest.raises(UsageError) as caught:
        merge_options(quantize="w8a8", quantizer="gptqq")
    assert caught.value.code == "CS1007"
    for part in ("There is no quantizer 'gptqq'", "Installed quantizers: gptq, rtn.", "Did you mean 'gptq'?"):
        assert part in caught.value.why
    recipe = recipe_from_yaml("passes:\n- quantize:\n    scheme: w8a8\n    quantizer: gptqq\n", source="r.yaml")
    with pytest.raises(UsageError) as caught:
        recipe.build_passes()
    assert (caught.value.code, caught.value.where) == ("CS1105", "r.yaml:4")
    assert "Installed quantizers: gptq, rtn." in str(caught.value)
