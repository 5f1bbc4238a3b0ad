"""The command line `tidepool`.

Errors that users can cause print one message and exit with status 2, without a traceback. Nothing
slow (torch, ray, transformers) is imported before a command needs it.
"""

from __future__ import annotations

import sys

import typer

from ..common.errors import TidepoolError
from .commands.config import config
from .commands.demo import demo
from .commands.serve import serve
from .commands.status import status

app = typer.Typer(
    name="tidepool",
    help=(
        "Serve language models with top-k sparse attention: prompts are computed on prefill nodes, "
        "answers on decode nodes that keep each request's KV in host memory. "
        "The API is OpenAI's (completions and chat)."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (serve, demo, status, config):
    app.command()(_command)


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except TidepoolError as error:
        lines = str(error).splitlines() or [type(error).__name__]
        print("error: " + "\n       ".join(lines), file=sys.stderr)
        raise SystemExit(2) from None
