"""The part ``building`` of a recipe: what is written. Options of backends stand in it as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Union

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from compile_sparse.compiler.extension.backends import declared_options
from compile_sparse.compiler.files.validation_errors import explained
from compile_sparse.compiler.files.yaml_lines import Document
from compile_sparse.compiler.recipes.option_values import declared_type
from compile_sparse.compiler.targets.target import Precision

__all__ = ["Building", "check_building"]


LARGEST_IMAGE = 8192


def _height_and_width(value: Any) -> Any:
    """``224`` is square, ``224x320`` height and width."""
    if isinstance(value, str):
        written = value.lower().split("x")
        if len(written) > 2 or not all(side.isascii() and side.isdigit() for side in written):
            raise ValueError("an image size is written 224 or 224x320 (height x width)")
        value = [int(side) for side in written]
    sides = [value] if isinstance(value, int) and not isinstance(value, bool) else value
    return (*sides, *sides) if isinstance(sides, (list, tuple)) and len(sides) == 1 else sides


_Side = Annotated[int, Field(ge=1, le=LARGEST_IMAGE)]
ImageSize = Annotated[
    tuple[_Side, _Side], BeforeValidator(_height_and_width, json_schema_input_type=int | str | list[int])
]


class Building(BaseModel):
    """Options of the artifact itself."""

    # A recipe names no target: which backend's options these are is known when it is compiled.
    model_config = ConfigDict(frozen=True, extra="allow")

    precision: Precision | None = Field(
        default=None, description="of what is not quantized, in the baseline too; null: the target's own"
    )
    image_size: ImageSize | None = Field(
        default=None,
        description="models of images: height and width the artifact takes, 224 or 224x320; null: the config's image_size",
    )
    emit: tuple[str, ...] = Field(default=(), description="forms written beside the artifact's own, such as triton")

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, value: Any) -> Any:
        """An option that is null was not given."""
        if not isinstance(value, Mapping):
            return value
        return {key: item for key, item in value.items() if item is not None or key in cls.model_fields}

    @property
    def options(self) -> dict[str, Any]:
        """Options of backends that were given."""
        return dict(self.model_extra or {})

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        if cls is not Building:
            return handler(schema)
        made = _with_every_option()
        return {**made.model_json_schema(), "title": cls.__name__, "description": cls.__doc__ or ""}


class _Closed(Building):
    model_config = ConfigDict(extra="forbid")


def _with_every_option() -> type[BaseModel]:
    """``Building`` with the options of every installed backend; one that two backends have takes what either takes."""
    types: dict[str, list[Any]] = {}
    descriptions: dict[str, str] = {}
    for model in declared_options().values():
        for name, field in model.model_fields.items():
            types.setdefault(name, []).append(declared_type(field))
            descriptions.setdefault(name, field.description or "")
    fields = {
        name: (Union[(*found, None)], Field(default=None, description=descriptions[name]))
        for name, found in types.items()
    }
    made: type[BaseModel] = create_model("Building", __base__=_Closed, **fields)  # type: ignore[call-overload]
    return made


def check_building(building: Building, document: Document | None, *, subject: str) -> None:
    """Whether some installed backend takes each option; what the target's own backend says of it comes when it is compiled.

    Args:
        building: of a recipe.
        document: where it stands; None when it came from flags or Python.
        subject: what was validated, as the message names it.

    Raises:
        UsageError: CS1105, with the line and the nearest key.
    """
    if not building.options:
        return
    model = create_model("Recipe", building=(_with_every_option(), ...))
    try:
        model.model_validate({"building": building.model_dump()})
    except ValidationError as error:
        raise explained(error, model, document, subject=subject) from error
