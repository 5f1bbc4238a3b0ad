"""Tells a front which nodes there are: asks every node actor who it is, again and again.

Runs on the front's asyncio loop, one task a node, so that one which cannot be reached delays no
other. A node that does not answer keeps what is known of it: whether it takes requests is decided
by the heartbeats of its session, not by Ray, which may be slow to see and slow to say. It is left
out once Ray says that it is dead or that there is no such actor.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ray.exceptions import ActorDiedError, RayError

from .front.nodes import NodeInfo

POLL_INTERVAL_S = 0.5
POLL_TIMEOUT_S = 30.0
"""A call that has not returned by then is given up, and the node is asked anew."""

log = logging.getLogger(__name__)


class MembershipPoller:
    """See the module.

    Args:
        names: of the node actors.
        look_up: name -> actor handle, which outlives the actor's restarts; ValueError if there is
            no such actor.
        update: takes the list of all known nodes.
    """

    def __init__(
        self,
        names: Sequence[str],
        look_up: Callable[[str], Awaitable[Any]],
        update: Callable[[list[NodeInfo]], None],
    ) -> None:
        self._names = names
        self._look_up = look_up
        self._update = update
        self._handles: dict[str, Any] = {}
        self._infos: dict[str, NodeInfo] = {}

    async def run(self) -> None:
        """Polls until it is cancelled."""
        await asyncio.gather(*(self._watch(name) for name in self._names))

    async def _watch(self, name: str) -> None:
        while True:
            await self._ask(name)
            self._update(list(self._infos.values()))
            await asyncio.sleep(POLL_INTERVAL_S)

    async def _ask(self, name: str) -> None:
        try:
            async with asyncio.timeout(POLL_TIMEOUT_S):
                if name not in self._handles:
                    self._handles[name] = await self._look_up(name)
                answer: dict[str, Any] = await self._handles[name].info.remote()
            self._infos[name] = NodeInfo(**answer)
        except (ValueError, ActorDiedError) as error:
            log.debug("%s is dead: %s", name, error)
            self._handles.pop(name, None)
            self._infos.pop(name, None)
        except (TimeoutError, RayError) as error:
            log.debug("%s does not answer: %s", name, error)
