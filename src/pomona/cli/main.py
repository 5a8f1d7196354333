"""The command ``pomona``: parse, call, print. Everything else is imported when a command runs."""

from __future__ import annotations

import io
import logging
import signal
import sys

import typer

from pomona.cli.commands import answer, cloud, look_at_photos, make_model, operate
from pomona.cli.options import app
from pomona.core.errors import PomonaError
from pomona.core.printable import escaped

__all__ = ["app", "main"]

COMMANDS = (make_model, look_at_photos, answer, operate, cloud)  # they add to the app when imported

INTERRUPTED = 130  # as shells have it: 128 and SIGINT


def _interrupt(number: int, _: object) -> None:
    raise KeyboardInterrupt(number)


def main() -> None:
    """Run the command. Errors become one line and an exit code."""
    logging.raiseExceptions = False  # a log that can't be written (a full disk) isn't the error
    signal.signal(signal.SIGTERM, _interrupt)  # a container's stop is a Ctrl-C
    try:
        # Typer returns the code of an Exit, and makes one of an interrupt.
        code = app(standalone_mode=False) or 0
    except PomonaError as error:
        typer.echo(f"pomona: {escaped(' '.join(str(error).split()))}", err=True)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if not hasattr(error, "show"):  # not a usage error of the command line
            raise
        usage = io.StringIO()
        error.show(usage)
        typer.echo("\n".join(map(escaped, usage.getvalue().rstrip().split("\n"))), err=True)
        code = 2
    if code == INTERRUPTED:
        typer.echo("pomona: stopped; run the same command again to go on", err=True)
    sys.exit(code)
