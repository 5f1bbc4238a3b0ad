"""Does the demo model answer on a GPU as on a CPU, and behind a hot buffer as resident?

    python benchmarks/same_answers.py --prompts 200 --processes 8

Asks a unified node for records, greedy, each prompt to its end: on the CPU in float32 (several
processes, each with its share of the prompts), then on the GPU in float32, in bfloat16 and with FP8
rows, resident and behind a hot buffer. Prints one line of JSON for each precision: shares of
outputs that are right, equal to the CPU's, and equal behind the hot buffer. One that differs is
printed with the log-probabilities of the first tokens that part.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from tidepool.common.wire import OutputToken, Sampling
from tidepool.deploy.demo.data import Prompt, make_prompt
from tidepool.deploy.demo.run import EXACT_ON_GPU, HOT_ROWS, demo_config
from tidepool.deploy.local import LocalNode

FIRST_SEED = 2_000_000
MAX_TOKENS = 12
ON_CPU = {**EXACT_ON_GPU, "model.device": "cpu"}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": EXACT_ON_GPU,
    "bfloat16": {"model.device": "cuda"},
    "FP8 rows": {"model.device": "cuda", "kv.layout": "mla_fp8"},
}

Output = list[OutputToken]


def make_prompts(first: int, count: int, length: int) -> list[Prompt]:
    """Half raw, half chat."""
    return [
        make_prompt(length, FIRST_SEED + number, form="chat" if number % 2 else "raw")
        for number in range(first, first + count)
    ]


def answers(prompts: list[Prompt], settings: dict[str, Any], seats: int) -> list[Output]:
    node = LocalNode(demo_config({**settings, "decode.seats": seats}))
    for number, prompt in enumerate(prompts):
        sampling = Sampling(MAX_TOKENS + len(prompt.completion), temperature=0.0, logprobs=2)
        node.submit(str(number), prompt.token_ids, sampling)
    node.run()
    node.close()
    return [list(node.tokens[str(number)]) for number in range(len(prompts))]


def on_cpu(first: int, count: int, length: int) -> list[list[int]]:
    """A process's share."""
    prompts = make_prompts(first, count, length)
    return [ids(output) for output in answers(prompts, {**ON_CPU, "decode.hot_rows": 0}, 2)]


def ids(output: Output) -> list[int]:
    return [token.token_id for token in output]


def is_right(prompt: Prompt, output: Output) -> bool:
    text = bytes(token for token in ids(output) if token < 256).decode("ascii", "replace")
    return bool(prompt.is_answered_by(text))


def share(flags: list[bool]) -> str:
    return f"{sum(flags)} of {len(flags)}"


def show_difference(name: str, number: int, one: Output, other: Output) -> None:
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a.token_id != b.token_id:
            print(f"{name}, prompt {number}, token {at}: {a} and {b}", flush=True)
            return
    print(f"{name}, prompt {number}: {len(one)} and {len(other)} tokens", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seats", type=int, default=16)
    parser.add_argument("--precisions", nargs="*", default=list(PRECISIONS), choices=PRECISIONS)
    arguments = parser.parse_args()
    count, length = arguments.prompts, arguments.prompt_tokens
    prompts = make_prompts(0, count, length)
    size = -(-count // arguments.processes)
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        parts: list[Future[list[list[int]]]] = [
            pool.submit(on_cpu, first, min(size, count - first), length)
            for first in range(0, count, size)
        ]
        outputs: dict[str, tuple[list[Output], list[Output], float]] = {}
        for name in arguments.precisions:
            begin_s = time.monotonic()
            resident, hot = (
                answers(prompts, {**PRECISIONS[name], "decode.hot_rows": rows}, arguments.seats)
                for rows in (0, HOT_ROWS)
            )
            outputs[name] = resident, hot, time.monotonic() - begin_s
        expected = [output for part in parts for output in part.result()]
    for name, (resident, hot, took_s) in outputs.items():
        same_hot = [ids(a) == ids(b) for a, b in zip(resident, hot, strict=True)]
        line = {
            "precision": name,
            "prompt_tokens": length,
            "right, resident": share(
                [is_right(*each) for each in zip(prompts, resident, strict=True)]
            ),
            "right, hot": share([is_right(*each) for each in zip(prompts, hot, strict=True)]),
            "hot = resident": share(same_hot),
            "resident = CPU": share([ids(a) == b for a, b in zip(resident, expected, strict=True)]),
            "seconds": round(took_s, 1),
        }
        print(json.dumps(line), flush=True)
        for number in [number for number, same in enumerate(same_hot) if not same][:5]:
            show_difference(name, number, resident[number], hot[number])


if __name__ == "__main__":
    main()
