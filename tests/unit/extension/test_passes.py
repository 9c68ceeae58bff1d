"""A pass is checked when it is loaded: what it lacks is said with its name and its entry point."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ValidationError

from compile_sparse.compiler.errors import CompileSparseError, EnvironmentFailure, Refusal
from compile_sparse.compiler.extension.pass_contract import PHASES, Pass, PassContext, PassResult
from compile_sparse.compiler.extension.passes import load_pass
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.recipes.recipe import recipe_from_yaml
from tests.installing import install

GROUP = "compile_sparse.passes"
COMPLETE: dict[str, Any] = {"name": "gptq", "phase": "quantization", "changes_numerics": True}


def run(self: Pass, program: Program, context: PassContext) -> PassResult:
    return PassResult(program, modified=False)


def pass_class(base: type = Pass, **members: Any) -> type:
    kinds = {"name": ClassVar[str], "phase": ClassVar[str], "changes_numerics": ClassVar[bool]}
    annotations = {name: kind for name, kind in kinds.items() if name in members}
    return type("Gptq", (base,), {"__annotations__": annotations, "__module__": __name__, **members})


def refusal(monkeypatch: pytest.MonkeyPatch, found: object) -> CompileSparseError:
    install(monkeypatch, GROUP, {"gptq": found})
    with pytest.raises(EnvironmentFailure) as caught:
        recipe_from_yaml("passes: [gptq]").build_passes()
    assert caught.value.code == "CS5002"
    assert "'gptq'" in caught.value.what and caught.value.where.startswith("entry point third_party:")
    return caught.value


def test_a_complete_pass_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    found = pass_class(**COMPLETE, run=run)
    install(monkeypatch, GROUP, {"gptq": found})
    assert load_pass("gptq") is found
    (made,) = recipe_from_yaml("passes: [gptq]").build_passes()
    assert (made.treats, made.contraction_multiple) == (frozenset({"gptq"}), 1)


@pytest.mark.parametrize("missing", sorted(COMPLETE))
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    members = {name: value for name, value in COMPLETE.items() if name != missing}
    assert f"lacks '{missing}'" in refusal(monkeypatch, pass_class(**members, run=run)).why


def test_a_pass_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "lacks 'run'" in refusal(monkeypatch, pass_class(**COMPLETE)).why


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"phase": "gptq"}, ", ".join(PHASES)),
        ({"changes_numerics": "yes"}, "neither True nor False"),
        ({"name": "awq"}, "is called 'awq'"),
    ],
)
def test_what_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, object], part: str) -> None:
    assert part in refusal(monkeypatch, pass_class(**COMPLETE | wrong, run=run)).why


@pytest.mark.parametrize(
    "found", [pass_class(BaseModel, **COMPLETE, run=run), run, "gptq"], ids=["class", "function", "text"]
)
def test_what_is_no_pass_is_refused(monkeypatch: pytest.MonkeyPatch, found: object) -> None:
    assert "no subclass of compile_sparse.compiler.extension.pass_contract.Pass" in refusal(monkeypatch, found).why


def test_an_unknown_name_lists_what_is_installed_and_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, GROUP, {"gptq": run}, alone=True)
    with pytest.raises(Refusal) as caught:
        load_pass("gptqq", where="r.yaml:3")
    error = caught.value
    assert (error.code, error.where, error.why) == ("CS4101", "r.yaml:3", "Installed passes: gptq.")
    assert error.hint == "Did you mean 'gptq'?"


def test_passes_are_frozen_and_take_no_other_options() -> None:
    made = pass_class(**COMPLETE, run=run)()
    with pytest.raises(ValidationError):
        made.option = 1  # type: ignore[attr-defined]
    with pytest.raises(ValidationError):
        type(made)(option=1)


def test_a_package_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        name, value = "gptq", "third_party:Gptq"

        def load(self) -> object:
            raise ImportError("no module named 'third_party'")

    monkeypatch.setattr("compile_sparse.compiler.extension.entry_points.installed", lambda group: {"gptq": Broken()})
    with pytest.raises(EnvironmentFailure, match="CS5002: Pass 'gptq' cannot be imported") as caught:
        load_pass("gptq")
    assert "no module named 'third_party'" in caught.value.why


@pytest.mark.parametrize(
    "name",
    [
        "prune-channels",
        "prune-heads",
        "prune-width",
        "prune-experts",
        "prune-conv",
        "prune-layers",
        "low-rank",
        "mask",
        "quantize",
        "quantize-cache",
    ],
)
def test_every_pass_of_ours_keeps_the_contract(name: str) -> None:
    assert load_pass(name).changes_numerics == name.startswith("quantize")
