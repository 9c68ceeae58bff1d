"""What every part of ``report.json`` is made of, and the part about the model that was compiled."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["DiagnosticEntry", "Section", "SourceSection"]


class Section(BaseModel):
    """A part of a report: closed, and without values that JSON lacks."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DiagnosticEntry(Section):
    """One thing left alone, and why."""

    where: str
    code: str
    why: str
    hint: str = ""


class SourceSection(Section):
    """The dense program against the model's own class, loaded by transformers from the same files."""

    model_class: str = Field(description="of transformers")
    tensors: int = Field(default=0, ge=0, description="equal, bit for bit, to what transformers loads")
    difference: float | None = Field(
        default=None, ge=0, description="of the outputs of one forward, relative to their largest value"
    )
    bound: float | None = Field(default=None, ge=0, description="what rounding explains of that")
    not_run: str = Field(default="", description="why there was no forward; empty when there was one")
    unused: tuple[str, ...] = Field(
        default=(), description="stored tensors that the model does not use; the first hundred"
    )
    skips: tuple[DiagnosticEntry, ...] = ()
