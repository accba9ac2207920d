"""How options are shown by ``--help``, and what is said of those that there are not."""

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from fqjax.runtime.names import did_you_mean


def _without_values(options: list[Any]) -> list[Any]:
    """Has flags shown without a value, as they take none; recent versions of typer show ``<bool>``."""
    for option in options:
        if getattr(option, "is_flag", False) and option.metavar is None:
            option.metavar = ""
    return options


class Command(TyperCommand):
    """A command whose flags are shown without a value."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The command's options and arguments, ``--help`` among them."""
        return _without_values(super().get_params(ctx))


class Group(TyperGroup):
    """A command with commands of its own, whose flags are shown without a value."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The group's options and arguments, ``--help`` among them."""
        return _without_values(super().get_params(ctx))


class Application(typer.Typer):
    """An application all of whose commands are of these classes."""

    def __init__(self, **settings: Any):
        super().__init__(cls=Group, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Any:
        """A decorator that adds a command."""
        return super().command(name, cls=Command, **settings)


def usage_message(error: Exception) -> str | None:
    """What a usage error of typer says, with the nearest option in place of one that there is not.

    Such errors come from a vendored module whose name has changed between versions, so they are told by their attributes.

    Returns:
      None if the error is no such error.
    """
    unknown = getattr(error, "option_name", None)
    if isinstance(unknown, str) and hasattr(error, "possibilities"):
        context = getattr(error, "ctx", None)
        options = [] if context is None else context.command.get_params(context)
        known = [name for option in options for name in option.opts if name.startswith("--")]
        return "; ".join([f"No such option: {unknown}", *did_you_mean(unknown, known)])
    message = getattr(error, "format_message", None)
    return None if message is None else message()
