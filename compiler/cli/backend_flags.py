"""Flags of installed backends, from the options that each of them declares.

They are asked for when a command line is parsed or its help is shown, never when the program starts: declared options import
pydantic, and ``compile-sparse --help`` must not.
"""

from __future__ import annotations

from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

import click

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

__all__ = ["CompilingCommand", "VerifyingCommand"]

_KEY = __name__


class _BackendCommand(click.Command):
    verify = False

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters, those of backends, and ``--help``."""
        own = super().get_params(ctx)
        if _KEY not in ctx.meta:
            ctx.meta[_KEY] = _flags(verify=self.verify)
        return [*own[: len(self.params)], *ctx.meta[_KEY], *own[len(self.params) :]]


class CompilingCommand(_BackendCommand):
    """A command with the options of backends for a compilation."""


class VerifyingCommand(_BackendCommand):
    """A command with the options of backends for measuring an artifact again."""

    verify = True


def _flags(*, verify: bool) -> list[click.Option]:
    from compile_sparse.compiler.extension.backends import declared_options

    found: dict[str, tuple[FieldInfo, list[str]]] = {}
    for backend, model in declared_options(verify=verify).items():
        for name, field in model.model_fields.items():
            found.setdefault(name, (field, []))[1].append(f"For {backend}: {field.description}.")
    return [_flag(name, field, " ".join(texts)) for name, (field, texts) in found.items()]


def _flag(name: str, field: FieldInfo, text: str) -> click.Option:
    """Only its form is checked here, as for the other flags; what a value may be is the backend's business."""
    from compile_sparse.compiler.extension.backends import flag_of
    from compile_sparse.compiler.recipes.option_values import literals

    declaration = (flag_of(name), name)
    types = {kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)} - {NoneType}
    if types == {bool}:
        return click.Option(declaration, is_flag=True, default=None, help=text)
    kind: Any = int if types == {int} else float if types == {float} else str
    metavar = "|".join(literals(field.annotation)) or ("VALUE" if kind is str else "N")
    return click.Option(declaration, type=kind, metavar=metavar, help=text)
