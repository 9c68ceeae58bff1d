"""An option of a backend is written down in one place, and recipes, Python and the command line have it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
from pydantic import Field

from compile_sparse import api
from compile_sparse.backends.null import NullBackend
from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.extension import entry_points as registry
from compile_sparse.compiler.extension.backend_contract import Lowered
from compile_sparse.compiler.extension.backend_options import BackendOptions, RunFacts
from compile_sparse.compiler.extension.backends import options_for
from compile_sparse.compiler.extension.run_settings import DEFAULT_SETTINGS, RunSettings
from compile_sparse.compiler.pipeline.job import baseline_key
from compile_sparse.compiler.pipeline.settling import settle_run
from compile_sparse.compiler.recipes.building import Building
from compile_sparse.compiler.recipes.flags import merge_options
from compile_sparse.compiler.recipes.recipe import Recipe, load_recipe, recipe_from_yaml
from compile_sparse.compiler.recipes.schema import schema_text
from compile_sparse.compiler.targets import target as targets_module
from compile_sparse.compiler.targets.target import Target, find_target, load_targets
from compile_sparse.compiler.targets.workload import Workload
from compile_sparse.testing.models import build_model
from tests.shell import shell

FACTS = RunFacts(Workload())


class FakeOptions(BackendOptions):
    tile_size: int = Field(default=16, ge=1, le=64, description="elements of a tile, 1 to 64")
    layout: Literal["rows", "columns"] | None = Field(default=None, description="order of tiles")
    fast: bool = Field(default=False, description="do not look back")


class FakeVerifyOptions(BackendOptions):
    quiet: bool = Field(default=False, description="say nothing")


class FakeBackend(NullBackend):
    """What a third party would write, in a folder of its own."""

    name = "fake"
    options = FakeOptions
    verify_options = FakeVerifyOptions
    seen: Sequence[RunSettings] = ()

    def lower(
        self, program: Any, target: Target, out: Path, progress: Any, settings: Any = DEFAULT_SETTINGS
    ) -> Lowered:
        FakeBackend.seen = (*FakeBackend.seen, settings)
        return super().lower(program, target, out, progress, settings)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Target:
    """A backend and a target beside those that are installed."""

    class Entry:
        name, value = "fake", f"{__name__}:FakeBackend"

        def load(self) -> type:
            return FakeBackend

    installed = registry.entry_points
    monkeypatch.setattr(registry, "entry_points", lambda group: [*installed(group=group), Entry()])
    monkeypatch.setattr(FakeBackend, "seen", ())
    target = find_target("null").model_copy(update={"name": "fake-cpu", "backend": "fake"})
    targets: Mapping[str, Target] = {**load_targets(), target.name: target}
    monkeypatch.setattr(targets_module, "load_targets", lambda: targets)
    return target


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    build_model("llama").save_pretrained(folder)
    return folder


def lowered_with() -> dict[str, Any]:
    """Options that the last lowering was given."""
    options = FakeBackend.seen[-1].options
    assert isinstance(options, FakeOptions)
    return options.model_dump()


def test_a_recipe_has_it(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("building: {tile_size: 32, layout: null}\n")
    jsonschema.validate({"building": {"tile_size": 32, "layout": None}}, json.loads(schema_text()))
    result = api.compile(model, target="fake-cpu", recipe=file, out=tmp_path / "a", verify=False)
    assert lowered_with() == {"tile_size": 32, "layout": None, "fast": False}
    manifest = json.loads((result.artifact / "manifest.json").read_text())
    assert manifest["recipe"]["building"] == {"precision": None, "image_size": None, "emit": [], "tile_size": 32}
    assert Recipe.model_validate(manifest["recipe"] | {"evaluation": {}}).building.options == {"tile_size": 32}


def test_python_has_it_over_a_recipe(model: Path, tmp_path: Path) -> None:
    recipe = recipe_from_yaml("building: {tile_size: 32, layout: rows}")
    api.compile(model, target="fake-cpu", recipe=recipe, tile_size=8, fast=True, out=tmp_path / "a", verify=False)
    assert lowered_with() == {"tile_size": 8, "layout": "rows", "fast": True}


def test_the_command_line_has_it(model: Path, tmp_path: Path) -> None:
    words = ("compile", model, "--target", "fake-cpu", "--tile-size", "4", "--fast", "--no-verify")
    done = shell(*words, "--out", tmp_path / "a")
    assert done.code == 0, done.errors
    assert lowered_with() == {"tile_size": 4, "layout": None, "fast": True}


def test_help_tells_it_where_it_means_something(capsys: pytest.CaptureFixture[str]) -> None:
    from compile_sparse.compiler.cli.main import run

    for command, there, elsewhere in (
        ("compile", "--layout rows|columns", "--quiet"),
        ("verify", "--quiet", "--layout"),
    ):
        assert run([command, "--help"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert there in text
        assert elsewhere not in text
    assert run(["compile", "--help"]) == 0
    assert "For fake: elements of a tile, 1 to 64." in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("building:\n  precision: fp32\n  tile_size: 65\n", 3, "less than or equal to 64"),
        ("building:\n  tile_sise: 8\n", 2, "Did you mean 'tile_size'?"),
        ("building:\n  engine: fast\n", 2, "'auto', 'none' or 'rtx-aot'"),
        ("building:\n\n  layout: [rows]\n", 3, "layout"),
    ],
)
def test_a_wrong_one_is_said_with_its_line(tmp_path: Path, text: str, line: int, part: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match="CS1105") as caught:
        load_recipe(path)
    assert caught.value.where == f"{path}:{line}"
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        ({"tile_size": 0}, "CS1105", "greater than or equal to 1"),
        ({"tile_sise": 8}, "CS1105", "Did you mean 'tile_size'?"),
        ({"quantise": "w8a8"}, "CS1105", "Did you mean 'quantize'?"),
        ({"quiet": True}, "CS1105", "quiet"),
    ],
)
def test_a_wrong_one_in_python_is_a_typed_error(options: dict[str, Any], code: str, part: str) -> None:
    with pytest.raises(UsageError, match=code) as caught:
        merge_options(**options)
    assert part in str(caught.value)


def test_another_backends_option_means_nothing() -> None:
    with pytest.raises(UsageError, match="CS1046") as caught:
        settle_run(find_target("null"), Building(tile_size=8), FACTS)  # type: ignore[call-arg]
    assert "--tile-size means nothing on null." in caught.value.what
    with pytest.raises(UsageError, match="CS1046") as caught:
        options_for(find_target("fake-cpu"), {"allow_foreign_engine": True}, verify=True)
    assert "choose a TensorRT target" in caught.value.hint
    assert options_for(find_target("fake-cpu"), {"allow_foreign_engine": False, "quiet": None}, verify=True) == (
        FakeVerifyOptions()
    )


def test_an_option_is_never_silently_dropped() -> None:
    """A recipe made in Python is checked when it is compiled."""
    with pytest.raises(UsageError, match="CS1105"):
        settle_run(find_target("fake-cpu"), Building(tile_sise=8), FACTS)  # type: ignore[call-arg]


def test_an_artifact_is_another_exactly_when_something_decides_so(fake: Target) -> None:
    def key(settings: RunSettings) -> str:
        return baseline_key("source", fake, settings, "1")

    plain = settle_run(fake, Building(), FACTS)
    assert key(plain) == key(settle_run(fake, Building(tile_size=16, precision="fp32"), FACTS)), "the defaults"  # type: ignore[call-arg]
    assert key(plain) == key(settle_run(fake, Building(), RunFacts(Workload(rounds=9, prompt=16)))), (
        "of no account here"
    )
    assert key(plain) != key(settle_run(fake, Building(tile_size=8), FACTS))  # type: ignore[call-arg]
    again = RunSettings(options=plain.options, verifying=FakeVerifyOptions(quiet=True))
    assert key(plain) == key(again), "how it is measured does not decide what is built"


def test_engines_are_built_for_the_workload() -> None:
    target = find_target("trt-a100")

    def key(work: Workload, **options: Any) -> str:
        settings = settle_run(target, Building(**options), RunFacts(work, 4096))
        return baseline_key("source", target, settings.for_baseline(runs_here=False), "1")

    plain = key(Workload())
    assert plain == key(Workload(rounds=9, threads=2)) == key(Workload(), engine="rtx-aot"), (
        "a baseline keeps no engine"
    )
    others = [key(Workload(prompt=64)), key(Workload(batch=16)), key(Workload(), max_length=512)]
    assert len({plain, *others}) == 4
