"""A click group whose first argument may be left out: ``compile-sparse MODEL`` means ``compile-sparse compile MODEL``."""

from __future__ import annotations

import copy
import difflib
import os

import click

__all__ = ["DefaultGroup", "hidden_alias"]


class DefaultGroup(click.Group):
    """Runs ``compile`` when the first word is neither a command nor an option of the group itself.

    A model folder that is called like a command is written ``./doctor``.
    """

    default = "compile"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {option for parameter in self.get_params(ctx) for option in parameter.opts}
        if args and args[0] not in self.commands and args[0] not in own:
            self._refuse_typo(ctx, args)
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def _refuse_typo(self, ctx: click.Context, args: list[str]) -> None:
        """A single unknown word that looks like a command is one, misspelt: a model would need a target."""
        near = difflib.get_close_matches(args[0], self.commands, n=1, cutoff=0.7)
        if near and "--target" not in " ".join(args) and not os.path.exists(args[0]):
            raise click.UsageError(f"There is no command {args[0]!r}. Did you mean {near[0]!r}?", ctx)


def hidden_alias(command: click.Command) -> click.Command:
    """The same command for another name, which help does not list."""
    alias = copy.copy(command)
    alias.hidden = True
    return alias
