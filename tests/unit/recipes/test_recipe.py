"""Recipes: YAML with lines, flags on top, order of passes, the committed schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import jsonschema
import pytest
import yaml
from pydantic import Field

from compile_sparse.compiler.errors import Refusal, UsageError
from compile_sparse.compiler.extension.pass_contract import Pass, PassContext, PassResult, Phase
from compile_sparse.compiler.ir.program import Program
from compile_sparse.compiler.recipes.flags import merge_options
from compile_sparse.compiler.recipes.recipe import Recipe, built_in_recipes, load_recipe, recipe_from_yaml
from compile_sparse.compiler.recipes.schema import schema_text
from compile_sparse.compiler.targets.workload import Workload, parse_workload
from tests.installing import install

ROOT = Path(__file__).parents[3]


class _Fake(Pass):
    changes_numerics: ClassVar[bool] = False

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult(program, modified=False)


class FakePrune(_Fake):
    name: ClassVar[str] = "prune-channels"
    phase: ClassVar[Phase] = "structural"
    fraction: float = Field(gt=0, lt=1)
    criterion: Literal["magnitude", "activation", "taylor"] | None = None
    allocation: Literal["uniform", "global"] = "uniform"
    unit: Literal["group", "query"] = "group"


class FakeLayers(_Fake):
    name: ClassVar[str] = "prune-layers"
    phase: ClassVar[Phase] = "depth"
    fraction: float = Field(gt=0, lt=1)
    criterion: Literal["ablation", "deepest"] = "deepest"
    unit: Literal["block", "attention", "mlp"] = "block"

    @property
    def treats(self) -> frozenset[str]:
        return frozenset({"attention", "mlp"} if self.unit == "block" else {self.unit})


class FakeMask(_Fake):
    name: ClassVar[str] = "mask"
    phase: ClassVar[Phase] = "masks"
    pattern: str
    criterion: str = "magnitude"


class FakeQuantize(_Fake):
    name: ClassVar[str] = "quantize"
    phase: ClassVar[Phase] = "quantization"
    scheme: Literal["w8a8", "w4a16"]
    quantizer: str = "rtn"


@pytest.fixture(autouse=True)
def passes(monkeypatch):
    """Four passes as an installation would register them; the recipe code must not care which."""
    fakes = (FakePrune, FakeLayers, FakeMask, FakeQuantize)
    install(monkeypatch, "compile_sparse.passes", {fake.name: fake for fake in fakes}, alone=True)


def test_yaml_becomes_passes():
    recipe = recipe_from_yaml("""
passes:
  - prune-channels: {fraction: 0.25}
  - mask: {pattern: 2:4}
  - quantize: {scheme: w8a8, quantizer: gptq}
evaluation: {slices: {no: norsk.jsonl}}
gates: ["decode_tok_s>=1.2x", "ppl[no]<=1.05x"]
""")
    prune, mask, quantize = recipe.build_passes()
    assert (prune.fraction, mask.pattern, quantize.quantizer) == (0.25, "2:4", "gptq")
    assert recipe.evaluation.slices == {"no": "norsk.jsonl"}  # YAML 1.1 would read False


def test_round_trip_through_yaml():
    recipe = recipe_from_yaml("passes: [{prune-channels: {fraction: 0.5}}, {quantize: {scheme: w8a8}}]\nseed: 7")
    again = recipe_from_yaml(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert again.model_dump() == recipe.model_dump()


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("seed: 1\npases: []\n", 2, "Did you mean 'passes'?"),
        ("workload:\n  prompt: 1\n  bach: 2\n", 3, "Did you mean 'batch'?"),
        ("evaluation:\n  slices:\n    en: a\n  sample: 3\n", 4, "Did you mean 'samples'?"),
        ("workload:\n  prompt: 0\n", 2, "greater than or equal to 1"),
        ("passes:\n  - {prune-channels: {}, mask: {}}\n", 2, "a pass is written"),
        ("gates:\n  - decode_tok_s>=1x\n  - speed>=2\n", 3, "no metric 'speed'"),
        ("schema_version: 2\n", 1, "Input should be 1"),
        ("seed: 1\nseed: 2\n", 2, "line 1"),
        ("- just a list\n", 1, "dict"),
        ("a: [\n", 2, ""),
    ],
)
def test_errors_carry_line_and_nearest_key(tmp_path, text, line, part):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    assert caught.value.where == f"{path}:{line}"
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("passes:\n- prune-channels:\n    fraction: 1.5\n", 3, "less than 1"),
        ("passes:\n- prune-channels:\n    fractoin: 0.5\n    fraction: 0.5\n", 3, "Did you mean 'fraction'?"),
        ("passes:\n- prune-channels:\n", 2, "fraction is required"),
        ("passes:\n- quantize: {scheme: w8a8}\n- prune-channels: {fraction: 0.5}\n", 3, "must come before 'quantize'"),
    ],
)
def test_pass_errors_carry_line(text, line, part):
    recipe = recipe_from_yaml(text, source="r.yaml")
    with pytest.raises(UsageError) as caught:
        recipe.build_passes()
    assert caught.value.where == f"r.yaml:{line}"
    assert part in str(caught.value)


def test_unknown_pass_is_refused_with_what_is_installed():
    with pytest.raises(Refusal) as caught:
        recipe_from_yaml("passes:\n\n- prune-heads: {fraction: 0.5}", source="r.yaml").build_passes()
    assert (caught.value.code, caught.value.where) == ("CS4101", "r.yaml:3")
    assert "mask, prune-channels, prune-layers, quantize" in caught.value.why


def test_paths_are_relative_to_the_file(tmp_path):
    (tmp_path / "r.yaml").write_text("calibration: {file: c.jsonl}\nevaluation: {slices: {en: e.jsonl}}")
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.calibration is not None
    assert recipe.calibration.file == str(tmp_path / "c.jsonl")
    assert recipe.evaluation.slices["en"] == str(tmp_path / "e.jsonl")


def test_canonical_form_follows_contents_not_folders(tmp_path):
    for folder, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "c.jsonl").write_text(text)
    a, b, c = (merge_options(calibration=tmp_path / folder / "c.jsonl").canonical() for folder in "abc")
    assert a == b != c
    assert str(tmp_path) not in json.dumps(a)
    with pytest.raises(UsageError, match="CS1107"):
        merge_options(calibration=tmp_path / "missing").canonical()


def test_built_in_recipes_parse_and_misspelt_names_are_guessed():
    assert built_in_recipes()
    for name in built_in_recipes():
        assert load_recipe(name).build_passes()
    with pytest.raises(UsageError, match="quarter"):
        load_recipe("quater")


def test_flags_override_and_insert_by_phase():
    base = recipe_from_yaml(
        "passes: [{prune-channels: {fraction: 0.5, criterion: taylor}}, {quantize: {scheme: w8a8}}]"
    )
    merged = merge_options(base, prune={"channels": 0.25}, sparsity="2:4", quantizer="gptq", seed=3)
    assert [request.name for request in merged.passes] == ["prune-channels", "mask", "quantize"]
    assert merged.passes[0].options == {"fraction": 0.25, "criterion": "taylor"}
    assert merged.passes[2].options == {"scheme": "w8a8", "quantizer": "gptq"}
    assert merged.seed == 3
    assert merged.build_passes()


def test_flags_alone_come_out_in_phase_order():
    merged = merge_options(quantize="w4a16", sparsity="2:4", prune={"channels": 0.5}, criterion="activation")
    assert [request.name for request in merged.passes] == ["prune-channels", "mask", "quantize"]
    assert merged.passes[0].options["criterion"] == "activation"
    assert "criterion" not in merged.passes[1].options
    assert merged.build_passes()


def test_a_pass_of_others_has_its_place_by_its_class_not_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Zeroing(_Fake):
        name: ClassVar[str] = "prune-nothing"
        phase: ClassVar[Phase] = "masks"
        criterion: Literal["magnitude", "random"] = "magnitude"

    install(monkeypatch, "compile_sparse.passes", {"prune-nothing": Zeroing})
    base = recipe_from_yaml("passes: [prune-nothing]")
    merged = merge_options(base, prune={"channels": 0.5}, quantize="w8a8", criterion="magnitude")
    assert [request.name for request in merged.passes] == ["prune-channels", "prune-nothing", "quantize"]
    assert [request.options.get("criterion") for request in merged.passes] == ["magnitude", None, None]
    merged = merge_options(base, prune={"channels": 0.5}, criterion="random")
    assert [request.options.get("criterion") for request in merged.passes] == [None, "random"]


def test_a_criterion_goes_to_the_passes_that_have_it():
    both = {"channels": 0.5, "layers": 0.5}
    for name, places in (("taylor", [0]), ("ablation", [1])):
        merged = merge_options(prune=both, criterion=name)
        assert [index for index, request in enumerate(merged.passes) if "criterion" in request.options] == places
        assert merged.passes[places[0]].options["criterion"] == name
        assert merged.build_passes()
    merged = merge_options(
        prune={"layers": 0.5}, sparsity="2:4", criterion="taylor"
    )  # prune-layers has no such criterion
    assert [request.options.get("criterion") for request in merged.passes] == [None, "taylor"]


def test_allocation_goes_to_the_passes_that_have_it():
    merged = merge_options(prune={"channels": 0.5, "layers": 0.5}, allocation="global")
    assert [request.options.get("allocation") for request in merged.passes] == ["global", None]
    assert merged.build_passes()[0].allocation == "global"
    base = recipe_from_yaml("passes: [{prune-channels: {fraction: 0.5, allocation: global}}]")
    assert merge_options(base, allocation="uniform").passes[0].options["allocation"] == "uniform"


def test_a_value_nobody_accepts_is_answered_with_the_accepted_ones():
    with pytest.raises(UsageError) as caught:
        merge_options(prune={"channels": 0.5, "layers": 0.5}, criterion="random")
    assert "prune-channels accepts: magnitude, activation, taylor." in caught.value.why
    assert "prune-layers accepts: ablation, deepest." in caught.value.why


@pytest.mark.parametrize(
    ("listed", "parts"),
    [
        (
            "prune-channels: {fraction: 0.25}}, {prune-channels: {fraction: 0.25}",
            ("1 - 0.75 x 0.75 = 0.4375", "not 0.5", "fraction 0.4375, or 0.5"),
        ),
        (
            "prune-channels: {fraction: 0.25, unit: query}}, {prune-channels: {fraction: 0.5}",
            ("(unit: query)", "(unit: group)", "1 - 0.75 x 0.5 = 0.625", "not 0.75", "fraction 0.625, or 0.75"),
        ),
        (
            "prune-channels: {fraction: 0.6}}, {prune-channels: {fraction: 0.7}",
            ("1 - 0.4 x 0.3 = 0.88", "not 1.3", "with fraction 0.88."),
        ),
        (
            "prune-layers: {fraction: 0.5, unit: mlp}}, {prune-layers: {fraction: 0.5}",
            ("(unit: mlp)", "(unit: block)", "= 0.75 in all, not 1.", "with fraction 0.75."),
        ),
        ("mask: {pattern: 2:4}}, {mask: {pattern: 4:8}", ("'mask' is asked for twice", "Write one of them.")),
        (
            "prune-channels: {fraction: 0.5}}, {prune-layers: {fraction: 0.5}}, {prune-layers: {fraction: 0.5}",
            ("0.75 in all",),
        ),
    ],
)
def test_passes_that_take_from_the_same_things_are_refused_with_the_arithmetic(listed: str, parts: tuple[str, ...]):
    with pytest.raises(Refusal) as caught:
        recipe_from_yaml(f"passes: [{{{listed}}}]").build_passes()
    assert (caught.value.code, caught.value.exit_code) == ("CS4105", 4)
    for part in parts:
        assert part in str(caught.value), part


def test_the_second_of_two_contradicting_passes_is_named_with_its_line():
    text = "passes:\n- prune-channels: {fraction: 0.5}\n- mask: {pattern: 2:4}\n- mask: {pattern: 1:4}\n"
    with pytest.raises(Refusal) as caught:
        recipe_from_yaml(text, source="r.yaml").build_passes()
    assert caught.value.where == "r.yaml:4"


def test_attention_and_mlp_branches_are_different_things():
    text = "passes: [{prune-layers: {fraction: 0.5, unit: mlp}}, {prune-layers: {fraction: 0.5, unit: attention}}]"
    built: Any = recipe_from_yaml(text).build_passes()
    assert [step.unit for step in built] == ["mlp", "attention"]


def test_every_data_flag_arrives():
    merged = merge_options(
        calibration="c.jsonl",
        calibration_samples=4,
        sequence_length=32,
        eval={"en": "e.jsonl"},
        max_quality_loss="1.25x",
        workload="prompt=16,rounds=7",
        gates=("ppl[en]<=1.1x",),
    )
    assert merged.calibration is not None
    assert merged.calibration.model_dump() == {"file": "c.jsonl", "samples": 4, "sequence_length": 32}
    assert merged.evaluation.model_dump() == {
        "slices": {"en": "e.jsonl"},
        "samples": None,
        "sequence_length": 32,
        "max_loss": 1.25,
    }
    assert merged.workload == Workload(prompt=16, rounds=7)
    assert merged.gates == ("ppl[en]<=1.1x",)


@pytest.mark.parametrize(("text", "value"), [("1.25x", 1.25), ("3", 3.0), (2, 2.0), ("none", None)])
def test_how_much_quality_may_be_lost(text, value):
    assert merge_options(max_quality_loss=text).evaluation.max_loss == value
    assert recipe_from_yaml(f"evaluation: {{max_loss: {text}}}").evaluation.max_loss == value
    assert Recipe().evaluation.max_loss == 1.1


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2, float("nan")])
def test_fractions_outside_the_open_interval(fraction):
    with pytest.raises(UsageError, match="CS1004"):
        merge_options(prune={"channels": fraction})


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"prune": {"heads": 0.5}}, "CS4101"),
        ({"low_rank": 0.5}, "CS4101"),
        ({"criterion": "magnitude"}, "CS1006"),
        ({"allocation": "global"}, "CS1006"),
        ({"allocation": "global", "prune": {"layers": 0.5}}, "CS1006"),
        ({"allocation": "global", "sparsity": "2:4"}, "CS1006"),
        ({"allocation": "evenly", "prune": {"channels": 0.5}}, "CS1007"),
        ({"criterion": "random", "prune": {"channels": 0.5}}, "CS1007"),
        ({"quantizer": "gptq"}, "CS1006"),
        ({"calibration_samples": 4}, "CS1006"),
        ({"gates": ("ppl[xx]<=1.1x",)}, "CS1012"),
        ({"seed": -1}, "CS1105"),
        ({"max_quality_loss": "0.9x"}, "CS1105"),
        ({"max_quality_loss": "much"}, "CS1105"),
        ({"gates": ("nonsense",)}, "CS1011"),
    ],
)
def test_options_that_cannot_hold(options, code):
    with pytest.raises((UsageError, Refusal)) as caught:
        merge_options(**options)
    assert caught.value.code == code


def test_workload_text():
    assert parse_workload("prompt=128, output=64,batch=2") == Workload(prompt=128, output=64, batch=2)
    for wrong, code in [
        ("prompt", "CS1005"),
        ("prompt=x", "CS1005"),
        ("batch=1,batch=2", "CS1005"),
        ("rounds=1", "CS1105"),
    ]:
        with pytest.raises(UsageError, match=code):
            parse_workload(wrong)
    with pytest.raises(UsageError, match="Did you mean 'output'"):
        parse_workload("ouput=3")


def test_recipes_are_frozen():
    recipe = Recipe()
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


def test_committed_schema_is_current_and_accepts_what_we_accept():
    committed = (ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8")
    assert committed == schema_text(), "run 'make schema'"
    schema = json.loads(committed)
    jsonschema.Draft202012Validator.check_schema(schema)
    for text in built_in_recipes().values():
        jsonschema.validate(yaml.safe_load(text), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"pases": []}, schema)


def test_requests_at_once_and_gpus_are_parts_of_the_workload() -> None:
    merged = merge_options(None, concurrency="1,8,8", tensor_parallel=4)
    assert merged.workload.levels == (1, 8)
    assert merged.workload.tensor_parallel == 4
    assert merge_options(None, workload="batch=3").workload.levels == (3,)
    assert merge_options(None, concurrency=[2]).workload.levels == (2,)
    with pytest.raises(UsageError, match="CS1105"):
        merge_options(None, concurrency="1,0")
    with pytest.raises(UsageError, match="CS1105"):
        merge_options(None, concurrency="many")
