"""Two prefill and two decode nodes under one front: every answer equals a unified node's."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass
from typing import Any

import httpx
from helpers.clusters import assert_settles_empty, demo, running

from tidepool.common.wire import Sampling
from tidepool.deploy.cluster import Cluster
from tidepool.deploy.demo.data import make_prompt
from tidepool.deploy.local import LocalNode

NUM_REQUESTS = 64
SETTINGS: dict[str, Any] = {
    "cluster.name": "mixed",
    "cluster.prefill": 2,
    "cluster.decode": 2,
    "cluster.cpus_per_node": 0.5,
    "decode.seats": 6,
    "decode.park_after_tokens": 4,
    "prefill.chunk_tokens": 512,
}


@dataclass(frozen=True)
class Case:
    token_ids: list[int]
    max_tokens: int
    is_stream: bool
    is_cancelled: bool


def cases() -> list[Case]:
    """Lengths from 1 to 4,000, most of them short; streams and not; some cancelled."""
    rng = random.Random(7)
    lengths = [1, 2, 63, 64, 65, 128, 4000, 3000] + [
        int(2 ** rng.uniform(0, 11)) for _ in range(NUM_REQUESTS - 8)
    ]
    made = []
    for number, length in enumerate(lengths):
        tokens = make_prompt(max(length, 128), seed=number, num_records=1).token_ids
        made.append(
            Case(
                token_ids=tokens[-length:],
                max_tokens=rng.randint(1, 24),
                is_stream=rng.random() < 0.5,
                is_cancelled=number % 8 == 5,
            )
        )
    return made


async def run(url: str, case: Case, client: httpx.AsyncClient) -> list[int] | None:
    """Output token ids, or None if the case hangs up early."""
    body = {
        "prompt": case.token_ids,
        "max_tokens": case.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": case.is_stream,
    }
    if case.is_cancelled:
        with contextlib.suppress(httpx.TimeoutException):
            await client.post(f"{url}/v1/completions", json=body, timeout=0.2)
        return None
    if not case.is_stream:
        response = await client.post(f"{url}/v1/completions", json=body)
        assert response.status_code == httpx.codes.OK, response.text
        return list(response.json()["choices"][0]["token_ids"])
    tokens: list[int] = []
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = httpx.Response(200, text=line.removeprefix("data: ")).json()
                assert "error" not in event, event
                tokens += event["choices"][0]["token_ids"] or []
    return tokens


async def run_all(cluster: Cluster, made: list[Case]) -> list[list[int] | None]:
    limits = httpx.Limits(max_connections=NUM_REQUESTS)
    async with httpx.AsyncClient(timeout=240.0, limits=limits) as client:
        return await asyncio.gather(*(run(cluster.url, case, client) for case in made))


def test_64_mixed_requests_equal_the_unified_run_and_leave_all_pools_empty() -> None:
    made = cases()
    unified = LocalNode(demo({"decode.seats": 8}))
    for number, case in enumerate(made):
        if not case.is_cancelled:
            sampling = Sampling(case.max_tokens, temperature=0.0, ignore_eos=True)
            unified.submit(str(number), case.token_ids, sampling)
    unified.run()
    with running(demo(SETTINGS)) as cluster:
        answers = asyncio.run(run_all(cluster, made))
        for number, (case, answer) in enumerate(zip(made, answers, strict=True)):
            if not case.is_cancelled:
                assert answer == unified.output(str(number)), f"request {number}"
        assert_settles_empty(cluster)
