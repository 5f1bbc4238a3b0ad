"""`tidepool status`: what a running front tells of its cluster."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ...common.errors import PeerError

TIMEOUT_S = 5.0


def status(
    url: Annotated[str, typer.Option(help="Where the front listens.")] = "http://127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="Print the front's JSON.")] = False,
    api_key: Annotated[
        str, typer.Option(metavar="KEY", help="One of the front's API keys, if it has any.")
    ] = "",
) -> None:
    """Show a running cluster as a table. Exit status 0: it is ready; 1: it is not."""
    view = fetch_cluster(url, api_key)
    if as_json:
        typer.echo(json.dumps(view, indent=2))
    else:
        _print_table(view)
    raise typer.Exit(0 if view["is_ready"] else 1)


def fetch_cluster(url: str, api_key: str = "") -> dict[str, Any]:
    """Returns GET /cluster; PeerError if there is no front at `url`, or it wants another key."""
    import httpx  # noqa: PLC0415  (slow to import; --help does not need it)

    try:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        response = httpx.get(f"{url.rstrip('/')}/cluster", headers=headers, timeout=TIMEOUT_S)
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise PeerError(f"{url} needs {'another' if api_key else 'an'} API key: --api-key KEY")
        response.raise_for_status()
        view = response.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise PeerError(f"no tidepool front answers at {url}: {error}") from error
    if not isinstance(view, dict) or "nodes" not in view or "is_ready" not in view:
        raise PeerError(f"{url} is not a tidepool front")
    return view


def _print_table(view: dict[str, Any]) -> None:
    from rich.console import Console  # noqa: PLC0415

    from ..front.cluster_view import cluster_table  # noqa: PLC0415

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(cluster_table(view))
