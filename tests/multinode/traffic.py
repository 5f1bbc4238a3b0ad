"""What runs while a fault is injected: streams that decode, and prompts on their way.

traffic = Traffic(cluster, answers)
traffic.begin()
... inject ...
outcome = traffic.end(since_s=...)
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from multinode.ray_cluster import RayCluster
from multinode.streams import Answers, Stream, check, join, question, start_streams, wait_for_tokens

NUM_PROMPTS = 4
OUTPUT_TOKENS = 240
LONG_PROMPT = 1200
LONG_OUTPUT = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """What clients saw, seconds.

    Attributes:
        gaps_s: for each stream that decoded, the longest silence that ended after the injection.
        ttfts_s: of the prompts on their way.
        num_failed: requests that ended with a typed error.
    """

    gaps_s: tuple[float, ...]
    ttfts_s: tuple[float, ...]
    num_failed: int


class Traffic:
    """See the module. Everything is greedy, so every token is known (`answers`)."""

    def __init__(
        self,
        cluster: RayCluster,
        answers: Answers,
        *,
        num_streams: int = 8,
        num_prompts: int = 2,
        prompt_tokens: int = 300,
    ) -> None:
        self._cluster = cluster
        self._answers = answers
        lengths = [prompt_tokens * (3 + i) // 3 for i in range(NUM_PROMPTS)]
        short = [question(length, 50, OUTPUT_TOKENS) for length in lengths]
        self._questions = [short[i % NUM_PROMPTS] for i in range(num_streams)]
        self._long = [question(LONG_PROMPT, 90 + i, LONG_OUTPUT) for i in range(num_prompts)]
        self._decoding: list[Stream] = []
        self._prefilling: list[Stream] = []
        for asked in (*short, *self._long):
            answers.of(asked)

    def begin(self, head_start_s: float = 0.3) -> None:
        """All streams have tokens; the prompts were sent `head_start_s` ago."""
        self._decoding = start_streams(self._cluster, self._questions)
        wait_for_tokens(self._decoding)
        self._prefilling = start_streams(self._cluster, self._long)
        time.sleep(head_start_s)

    def end(self, since_s: float) -> Outcome:
        """Waits for the end of all; AssertionError if one hangs or has a wrong token."""
        streams = [*self._decoding, *self._prefilling]
        join(streams)
        num_failed = check(streams, self._answers)
        return Outcome(
            tuple(stream.longest_gap_s(since_s) for stream in self._decoding),
            tuple(each.ttft_s for each in self._prefilling if len(each.times_s) > 1),
            num_failed,
        )

    @property
    def errors(self) -> list[str]:
        """What failed requests were told."""
        streams = (*self._decoding, *self._prefilling)
        return [str(stream.error) for stream in streams if stream.error is not None]
