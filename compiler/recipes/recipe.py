"""Recipes: what to do to a model, as data.

A recipe is a YAML file, a built-in name, a set of command-line flags, or a mixture; all end as one frozen ``Recipe``. Options
of a pass are not known here: the class registered for it validates them when ``build_passes`` is called, so that reading a
recipe imports no pass.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic import model_serializer as _serializer
from pydantic.json_schema import JsonSchemaValue

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.extension.pass_contract import PHASES, Pass
from compile_sparse.compiler.extension.passes import load_pass
from compile_sparse.compiler.files.digests import digest_file, folder_digests
from compile_sparse.compiler.files.validation_errors import explained
from compile_sparse.compiler.files.yaml_lines import Document, Location, parse_yaml, read_yaml
from compile_sparse.compiler.recipes.building import Building, check_building
from compile_sparse.compiler.recipes.conflicts import refuse_second
from compile_sparse.compiler.targets.workload import Workload
from compile_sparse.compiler.verify.gates import parse_gate
from compile_sparse.compiler.verify.quality import MAX_LOSS

__all__ = [
    "Beginning",
    "Calibration",
    "Evaluation",
    "PassRequest",
    "Recipe",
    "built_in_recipes",
    "load_recipe",
    "recipe_from_yaml",
]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class _Origin:
    """Where a request stands in a file; flags and Python have none."""

    document: Document
    location: Location


class PassRequest(_Model):
    """One pass and its options. In YAML: ``- prune-channels: {fraction: 0.25}``."""

    name: str = Field(min_length=1, description="entry-point name of the pass")
    options: dict[str, Any] = Field(default_factory=dict, description="options, validated by the pass's own class")
    _origin: _Origin | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and len(value) == 1:
            (name, options), *_ = value.items()
            if options is None or isinstance(options, Mapping):
                return {"name": name, "options": dict(options or {})}
        if isinstance(value, Mapping) and set(value) == {"name", "options"} and isinstance(value["options"], Mapping):
            return value
        raise ValueError("a pass is written '- name: {option: value}'")

    @_serializer
    def _as_yaml(self) -> dict[str, Any]:
        return {self.name: self.options}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> JsonSchemaValue:
        return {
            "title": "PassRequest",
            "description": cls.__doc__,
            "oneOf": [
                {"type": "string", "minLength": 1, "description": "a pass with its default options"},
                {
                    "type": "object",
                    "minProperties": 1,
                    "maxProperties": 1,
                    "additionalProperties": {"anyOf": [{"type": "object"}, {"type": "null"}]},
                },
            ],
        }

    @property
    def where(self) -> str:
        """``file:line``, or the pass's name when the request came from flags."""
        return self._origin.document.where(self._origin.location) if self._origin else f"pass {self.name}"


class Calibration(_Model):
    """Text the model is observed on, to score weights and to set quantization ranges."""

    file: str = Field(min_length=1, description="JSONL file; one {'text': ...} or {'input_ids': [...]} per line")
    samples: int = Field(default=128, ge=1, le=1_000_000, description="windows used, 1 to 1,000,000")
    sequence_length: int | None = Field(
        default=None,
        ge=2,
        le=1_000_000,
        description="tokens per window, 2 to 1,000,000; null: 256, or the model's longest",
    )


Beginning = Literal["tokenizer", "always", "never"]


def _times(value: Any) -> Any:
    """``1.10x``, as on the command line, is the number 1.10, and ``none`` no number."""
    if value == "none":
        return None
    return value[:-1] if isinstance(value, str) and value.endswith("x") else value


class Evaluation(_Model):
    """Data the quality is measured on, by named slice: text, pairs of query and document, labelled text, or arrays."""

    slices: dict[str, str] = Field(
        default_factory=dict,
        description="slice name -> JSONL file, .npz or folder of images; what it holds is told by its content",
    )
    samples: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="windows, lines or samples per slice, 1 to 1,000,000; null: 64 windows of text for language models, 1,000 "
        "lines or samples for others",
    )
    sequence_length: int | None = Field(
        default=None,
        ge=2,
        le=1_000_000,
        description="tokens per window, 2 to 1,000,000; null: 256, or the model's longest",
    )
    max_loss: Annotated[float | None, BeforeValidator(_times)] = Field(
        default=MAX_LOSS,
        ge=1,
        le=1e9,
        description="how many times worse than the dense model the worst slice may be, 1 to 1e9: a ratio of perplexities, or of "
        "the dense model's score to the compiled one's; beyond it the verdict is quality-lost; null: no limit",
    )


def _gate(text: str) -> str:
    try:
        parse_gate(text)
    except UsageError as error:
        raise ValueError(f"{error.what} {error.why}") from error
    return text


class Recipe(_Model):
    """Everything a compilation is asked for, except the model, the target and the output folder."""

    schema_version: Literal[1] = Field(default=1, description="version of this format")
    passes: tuple[PassRequest, ...] = Field(default=(), description=f"in the order of phases: {', '.join(PHASES)}")
    calibration: Calibration | None = Field(default=None, description="null when no pass needs data")
    evaluation: Evaluation = Field(default_factory=Evaluation, description="quality slices")
    workload: Workload = Field(default_factory=Workload, description="what speed is measured on")
    building: Building = Field(default_factory=Building, description="what is written, and in which precision")
    gates: tuple[Annotated[str, AfterValidator(_gate)], ...] = Field(
        default=(), description="conditions that must hold, e.g. 'decode_tok_s>=1.2x'"
    )
    bos: Beginning = Field(
        default="tokenizer",
        description="what windows cut from calibration and evaluation text begin with; tokenizer: what the model's tokenizer "
        "puts before a text, if anything; always: the beginning-of-sequence token where the tokenizer adds none; never: the text",
    )
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="for anything random, 0 to 2^63-1")

    def build_passes(self) -> tuple[Pass, ...]:
        """Instances of the requested passes, options validated, in order.

        Raises:
            Refusal: CS4101 for a pass that is not installed, CS4105 for two that treat the same things.
            UsageError: CS1105 for a wrong option, CS1106 for a wrong order.
        """
        built: list[tuple[PassRequest, Pass]] = []
        for request in self.passes:
            cls = load_pass(request.name, where=request.where)
            try:
                made = cls.model_validate(request.options)
            except ValidationError as error:
                origin = request._origin
                raise explained(
                    error,
                    cls,
                    origin.document if origin else None,
                    prefix=(*origin.location, request.name) if origin else (),
                    subject=f"pass {request.name}",
                ) from error
            if built:
                _check_order(*built[-1], request, made)
            for _, earlier in built:
                refuse_second(earlier, made, where=request.where)
            built.append((request, made))
        return tuple(made for _, made in built)

    def canonical(self) -> dict[str, Any]:
        """The recipe as plain data with every file as ``{"name", "sha256"}``.

        Two recipes with equal canonical forms ask for the same work whatever their files are called, and the form carries
        no folder of the machine it was made on.

        Raises:
            UsageError: CS1107 when a file cannot be read.
        """
        data = self.model_dump(mode="json")
        if self.calibration:
            data["calibration"]["file"] = _fingerprint(self.calibration.file, "calibration")
        slices = self.evaluation.slices
        data["evaluation"]["slices"] = {name: _fingerprint(slices[name], f"slice {name!r}") for name in sorted(slices)}
        return data


def _check_order(before: PassRequest, first: Pass, request: PassRequest, second: Pass) -> None:
    ranks = {phase: rank for rank, phase in enumerate(PHASES)}
    if ranks[second.phase] < ranks[first.phase]:
        raise UsageError(
            "CS1106",
            f"Pass {request.name!r} must come before {before.name!r}.",
            where=request.where,
            why=f"{request.name!r} is of phase {second.phase!r}, {before.name!r} of phase {first.phase!r}; "
            f"phases run in this order: {', '.join(PHASES)}.",
            hint=f"Move {request.name!r} up.",
        )


def _fingerprint(file: str, role: str) -> dict[str, str]:
    try:
        digest = _folder_digest(Path(file)) if Path(file).is_dir() else digest_file(Path(file))[0]
    except (OSError, ValueError) as error:
        raise UsageError(
            "CS1107",
            f"The file of {role} cannot be read.",
            where=file,
            why=str(getattr(error, "strerror", None) or error),
        ) from error
    return {"name": Path(file).name, "sha256": digest}


def _folder_digest(folder: Path) -> str:
    """sha256 over the names and digests of its files."""
    total = hashlib.sha256()
    for name, (digest, _) in sorted(folder_digests(folder).items()):
        total.update(f"{name}\0{digest}\0".encode())
    return total.hexdigest()


def built_in_recipes() -> dict[str, str]:
    """Name -> YAML text of the recipes that come with the package."""
    folder = files("compile_sparse.compiler.recipes")
    found = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return {name.removesuffix(".yaml"): (folder / name).read_text(encoding="utf-8") for name in found}


def load_recipe(source: str | Path) -> Recipe:
    """A recipe from a YAML file, or a built-in one by name. Paths inside a file are relative to the file.

    Raises:
        UsageError: with the file, the line and the nearest valid key.
    """
    path = Path(source)
    if path.is_file() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return _from_document(read_yaml(path), folder=path.parent)
    built_in = built_in_recipes()
    if str(source) in built_in:
        return recipe_from_yaml(built_in[str(source)], source=f"built-in recipe {source}")
    near = difflib.get_close_matches(str(source), built_in, n=2, cutoff=0.4)
    raise UsageError(
        "CS1108",
        f"There is no recipe {str(source)!r}.",
        where="--recipe",
        why=f"It is neither a file nor a built-in recipe ({', '.join(built_in)}).",
        hint=f"Did you mean {' or '.join(near)}?" if near else "",
    )


def recipe_from_yaml(text: str, *, source: str = "recipe") -> Recipe:
    """A recipe from YAML text; paths in it stay as they are."""
    return _from_document(parse_yaml(text, source=source), folder=None)


def _from_document(document: Document, *, folder: Path | None) -> Recipe:
    data = {} if document.data is None else document.data
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise explained(error, Recipe, document, subject="recipe") from error
    check_building(recipe.building, document, subject="recipe")
    for index, request in enumerate(recipe.passes):
        # A private attribute: the model is frozen for users, and where it was written is not part of its value.
        request._origin = _Origin(document, ("passes", index))
    return recipe if folder is None else _with_files_from(recipe, folder)


def _with_files_from(recipe: Recipe, folder: Path) -> Recipe:
    calibration = recipe.calibration
    if calibration:
        calibration = calibration.model_copy(update={"file": str(folder / calibration.file)})
    slices = {name: str(folder / file) for name, file in recipe.evaluation.slices.items()}
    evaluation = recipe.evaluation.model_copy(update={"slices": slices})
    return recipe.model_copy(update={"calibration": calibration, "evaluation": evaluation})
