"""What both commands share: how they look, how they end, and that nothing ends unexplained."""

# No `from __future__ import annotations` here: typer reads the annotations as they are.
import errno
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from bcseg_batch.errors import BcsegError, OutputError
from bcseg_batch.text import printable
from bcseg_batch.version import __version__


class _Commands(TyperGroup):
    """Commands whose help shows no type beside a flag, which takes no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _untyped_flags(super().get_params(ctx))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            _untyped_flags(command.get_params(ctx))
        return command


def _untyped_flags(parameters: Iterable[Any]) -> list[Any]:
    found = list(parameters)
    for parameter in found:
        if getattr(parameter, "is_flag", False) and parameter.metavar is None:
            parameter.metavar = ""
    return found


def new_app(name: str, about: str) -> typer.Typer:
    """Make a command line that knows `-h`, `--help` and `--version`; commands are added to it.

    Args:
        name: of the program.
        about: what it is for, in a sentence.
    """
    app = typer.Typer(
        name=name,
        help=about,
        cls=_Commands,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        # Boxes and colours would take a third of the time until the help is there.
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def show_version(value: bool) -> None:
        if value:
            typer.echo(f"{name} {__version__}")
            raise typer.Exit

    @app.callback()
    def root(
        version: Annotated[
            bool,
            typer.Option(
                "--version", callback=show_version, is_eager=True, help="Show the version."
            ),
        ] = False,
    ) -> None:
        pass

    return app


def run(app: Callable[[], Any], name: str) -> None:
    """Run a command line; every expected error ends in one sentence and its exit code.

    A bug ends in its traceback and `BcsegError`'s exit code (EX_SOFTWARE), Ctrl-C in 130, and a
    standard output that takes no more in `OutputError`'s.

    Args:
        app: parses the arguments of the process and acts.
        name: of the program, before each sentence.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A summary names files, whatever characters the terminal has.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where a full disk can still be told
    except BcsegError as error:
        for line in str(error).splitlines():
            _say(name, printable(line))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - a bug: told whole, with a code of its own
        if _is_of_the_printout(error):
            # The interpreter would try to flush once more at its end, and say so in its own words.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - until the process ends
            _say(name, f"cannot print: {error}")
            sys.exit(OutputError.exit_code)
        traceback.print_exc()
        sys.exit(BcsegError.exit_code)


def _say(name: str, text: str) -> None:
    print(f"{name}: {text}", file=sys.stderr)  # noqa: T201 - the one place that does


def _is_of_the_printout(error: Exception) -> bool:
    """Say whether it is standard output that took no more: on a full disk, or a closed pipe."""
    codes = {errno.ENOSPC, errno.EPIPE, errno.EIO}
    return isinstance(error, OSError) and error.errno in codes and error.filename is None
