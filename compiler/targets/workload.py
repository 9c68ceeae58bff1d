"""What is measured: prompt and output length, requests at once, rounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from compile_sparse.compiler.errors import UsageError
from compile_sparse.compiler.files.validation_errors import explained

__all__ = ["Workload", "parse_workload"]


Level = Annotated[int, Field(ge=1, le=65_536)]


class Workload(BaseModel):
    """The requests that speed is measured on and optimised for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: int = Field(default=128, ge=1, le=1_000_000, description="prompt length in tokens, 1 to 1,000,000")
    output: int = Field(default=64, ge=1, le=1_000_000, description="generated tokens per request, 1 to 1,000,000")
    batch: int = Field(default=1, ge=1, le=65_536, description="requests (decoders) or samples at once, 1 to 65,536")
    rounds: int = Field(
        default=5, ge=3, le=1_000, description="alternating baseline and compiled measurements, 3 to 1,000"
    )
    threads: int | None = Field(
        default=None, ge=1, le=4_096, description="CPU threads of the runtime, 1 to 4,096; null lets the runtime choose"
    )
    concurrency: tuple[Level, ...] = Field(
        default=(),
        max_length=16,
        description="decoders: numbers of requests at once that are measured one after the other, each 1 to 65,536; the verdict "
        "follows the first; empty: batch",
    )
    tensor_parallel: int = Field(
        default=1, ge=1, le=1_024, description="GPUs the model will be split over, 1 to 1,024; sizes are kept divisible"
    )

    @field_validator("concurrency", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, int):
            return (value,)
        return tuple(int(part) for part in value.split(",")) if isinstance(value, str) else value

    @property
    def levels(self) -> tuple[int, ...]:
        """Numbers of requests at once, in the order they are measured."""
        return tuple(dict.fromkeys(self.concurrency)) or (self.batch,)


def parse_workload(text: str | Mapping[str, Any] | Workload, base: Workload | None = None) -> Workload:
    """``prompt=128,output=64,batch=1`` on top of ``base`` (the defaults when None).

    Raises:
        UsageError: CS1005 when the text is not KEY=NUMBER pairs, CS1105 for unknown keys and values out of range.
    """
    if isinstance(text, Workload):
        return text
    given = dict(text) if isinstance(text, Mapping) else _pairs(text)
    values = (base or Workload()).model_dump() | given
    try:
        return Workload.model_validate(values)
    except ValidationError as error:
        raise explained(error, Workload, None, subject="workload") from error


def _pairs(text: str) -> dict[str, int]:
    pairs: dict[str, int] = {}
    for part in text.split(","):
        key, separator, value = part.partition("=")
        key = key.strip()
        try:
            number = int(value)
        except ValueError:
            separator = ""
            number = 0
        if not separator or key in pairs:
            raise UsageError(
                "CS1005",
                f"{text!r} is not a workload.",
                where="--workload",
                why=f"{key!r} appears twice." if key in pairs else f"{part!r} is not KEY=NUMBER.",
                hint="Write for example prompt=128,output=64,batch=1.",
            )
        pairs[key] = number
    return pairs
