"""Shows that the demo model answers through the sparse path, and that its answers come from the host.

    python -m tidepool.deploy.demo.acceptance --prompts 20

    python -m tidepool.deploy.demo.acceptance --set model.device=cuda

Runs the real engines of a unified node, asks for records under keys that training never
saw, and prints one row a check:

| check | what is run | passes when |
|---|---|---|
| recall N | prompts of N tokens, everything resident | at least 97 % right |
| swap-in | the same prompts behind a hot buffer of 256 rows | every output token equal |
| random, recent | other tokens in place of the indexer's choice | at most 5 % right |
| overwritten | one request's record is overwritten in host pages | that answer changes, no other |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ...common.wire import Sampling
from ...decode_node.sequence import Sequence
from ...model.runtime import Runtime, load_runtime
from ..commands.options import parse_settings
from ..local import LocalNode
from .data import Prompt, make_prompt
from .run import HOT_ROWS, demo_config

MAX_TOKENS = 12
FIRST_SEED = 1_000_000
MIN_RECALL = 0.97
MAX_CONTROL = 0.05


@dataclass(frozen=True, slots=True)
class Result:
    """One row of the table. `value` is what was measured, `limit` what it must be."""

    check: str
    num_prompts: int
    value: str
    limit: str
    passed: bool


class Acceptance:
    """Runs the checks over one loaded model.

    Args:
        num_prompts: prompts of each length, half of them in chat form.
        lengths: prompt tokens.
        control_length: prompt tokens of the two controls.
        overrides: of the demo's configuration, such as the device.
    """

    def __init__(
        self,
        num_prompts: int,
        lengths: tuple[int, ...],
        control_length: int,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        self._lengths = lengths
        self._control_length = control_length
        self._num_prompts = num_prompts
        self._overrides = {"decode.seats": 2, **(overrides or {})}
        self._runtime: Runtime = load_runtime(demo_config(self._overrides))

    def run(self) -> list[Result]:
        results, resident = [], {}
        for length in self._lengths:
            prompts = self._prompts(length)
            resident[length] = self._answers(prompts, hot_rows=0)
            results.append(self._recall(length, prompts, resident[length]))
        results.append(self._swap_in(resident))
        for name, select in (("random", _select_random), ("recent", _select_recent)):
            results.append(self._control(name, self._control_length, select))
        results.append(self._overwritten(min(self._lengths)))
        return results

    def _prompts(self, length: int) -> list[Prompt]:
        return [
            make_prompt(length, FIRST_SEED + number, form="chat" if number % 2 else "raw")
            for number in range(self._num_prompts)
        ]

    def _node(self, hot_rows: int, **overrides: Any) -> LocalNode:
        settings = {**self._overrides, **overrides, "decode.hot_rows": hot_rows}
        return LocalNode(demo_config(settings), self._runtime)

    def _answers(
        self, prompts: list[Prompt], *, hot_rows: int, **overrides: Any
    ) -> list[list[int]]:
        """Output token ids of each prompt, decoded together."""
        node = self._node(hot_rows, **overrides)
        _submit(node, prompts)
        node.run()
        node.close()
        return [node.output(str(number)) for number in range(len(prompts))]

    def _recall(self, length: int, prompts: list[Prompt], answers: list[list[int]]) -> Result:
        share = _share_right(prompts, answers)
        return Result(
            f"recall at {length} tokens",
            len(prompts),
            f"{share:.1%}",
            f">= {MIN_RECALL:.0%}",
            share >= MIN_RECALL,
        )

    def _swap_in(self, resident: dict[int, list[list[int]]]) -> Result:
        num_equal, num_all = 0, 0
        for length, expected in resident.items():
            answers = self._answers(self._prompts(length), hot_rows=HOT_ROWS)
            num_equal += sum(a == b for a, b in zip(answers, expected, strict=True))
            num_all += len(expected)
        value = f"{num_equal} of {num_all} outputs equal"
        check = f"swap-in on (hot buffer {HOT_ROWS}) against resident"
        return Result(check, num_all, value, "all", num_equal == num_all)

    def _control(self, name: str, length: int, select: Callable[..., None]) -> Result:
        prompts = self._prompts(length)
        with (
            patch("tidepool.prefill_node.context.select_topk", select),
            patch("tidepool.decode_node.context.select_topk", select),
        ):
            # The choice is made on the host, which a graph cannot replay.
            settings = {"decode.cuda_graphs": False}
            share = _share_right(prompts, self._answers(prompts, hot_rows=0, **settings))
        return Result(
            f"{name} tokens in place of the indexer's, {length} tokens",
            len(prompts),
            f"{share:.1%}",
            f"<= {MAX_CONTROL:.0%}",
            share <= MAX_CONTROL,
        )

    def _overwritten(self, length: int) -> Result:
        """Overwrites the record of request 0 in its host pages before it decodes."""
        prompts = self._prompts(length)[: max(2, min(4, self._num_prompts))]
        expected = self._answers(prompts, hot_rows=HOT_ROWS)
        node = self._node(HOT_ROWS)
        coordinator = node.decode.coordinator
        stage = coordinator.admit_request_into_staging

        def stage_and_overwrite(sequence: Sequence, source: Any, source_pages: list[int]) -> None:
            stage(sequence, source, source_pages)
            coordinator.backup.wait(sequence)
            if sequence.key[0] == "0":
                pages = sequence.host_lease.pages
                _overwrite(coordinator.host.rows, pages, coordinator.host.page_size, prompts[0])

        with patch.object(coordinator, "admit_request_into_staging", stage_and_overwrite):
            _submit(node, prompts)
            node.run()
        node.close()
        changed = [
            number for number in range(len(prompts)) if node.output(str(number)) != expected[number]
        ]
        value = f"answers {changed} changed"
        check = "host rows of record 0 overwritten"
        return Result(check, len(prompts), value, "answers [0]", changed == [0])


def _submit(node: LocalNode, prompts: list[Prompt]) -> None:
    for number, prompt in enumerate(prompts):
        sampling = Sampling(max_tokens=MAX_TOKENS + len(prompt.completion), temperature=0.0)
        node.submit(str(number), prompt.token_ids, sampling)


def _share_right(prompts: list[Prompt], answers: list[list[int]]) -> float:
    texts = [bytes(token for token in answer if token < 256) for answer in answers]
    right = [
        prompt.is_answered_by(text.decode("ascii", errors="replace"))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    return sum(right) / len(right)


def _overwrite(rows_LSX: Tensor, host_pages: list[int], page_size: int, prompt: Prompt) -> None:
    """Copies the rows before the record over the record's own, in every layer."""
    first, end = prompt.record_token_span

    def slots(begin: int) -> Tensor:
        positions = torch.arange(begin, begin + end - first)
        return torch.tensor(host_pages)[positions // page_size] * page_size + positions % page_size

    rows_LSX[:, slots(first)] = rows_LSX[:, slots(2 * first - end)]


def _select_recent(scores_TC: Tensor, lens_T: Tensor, topk_idx_TK: Tensor) -> None:
    """The newest K positions, whatever their scores."""
    width = topk_idx_TK.shape[1]
    lens_T1 = lens_T.to(torch.int32)[:, None]
    offsets = torch.arange(width, dtype=torch.int32, device=lens_T.device)[None]
    positions = (lens_T1 - width).clamp_min(0) + offsets
    topk_idx_TK.copy_(torch.where(positions < lens_T1, positions, -1))


def _select_random(scores_TC: Tensor, lens_T: Tensor, topk_idx_TK: Tensor) -> None:
    """K distinct random positions: one from each of K equal stretches of the context."""
    width = topk_idx_TK.shape[1]
    generator = torch.Generator().manual_seed(int(lens_T.sum()))
    device, lens_T = lens_T.device, lens_T.cpu()
    edges = torch.linspace(0, 1, width + 1, dtype=torch.float64)[None] * lens_T[:, None]
    first, end = edges[:, :-1].long(), edges[:, 1:].long()
    draw = torch.rand(first.shape, generator=generator, dtype=torch.float64)
    positions = first + (draw * (end - first)).long()
    topk_idx_TK.copy_(torch.where(end > first, positions, -1).to(device, torch.int32))


def show(results: list[Result], console: Console) -> None:
    table = Table("check", "prompts", "measured", "required", "", title="demo model")
    for result in results:
        verdict = "[green]ok[/green]" if result.passed else "[red]FAILED[/red]"
        table.add_row(result.check, str(result.num_prompts), result.value, result.limit, verdict)
    console.print(table)


def main(
    prompts: int = typer.Option(20, help="Prompts of each length, half raw, half chat."),
    lengths: str = typer.Option("2048,4096,8000", help="Prompt tokens, comma separated."),
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="SECTION.KEY=VALUE, as for serve.")
    ] = None,
) -> None:
    """Prints the table; exits with 1 if a check fails."""
    wanted = tuple(int(length) for length in lengths.split(","))
    overrides = parse_settings(settings or ())
    results = Acceptance(prompts, wanted, max(wanted), overrides).run()
    show(results, Console())
    raise typer.Exit(0 if all(result.passed for result in results) else 1)


if __name__ == "__main__":
    typer.run(main)
