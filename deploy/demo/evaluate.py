"""Measures a checkpoint's recall: exact match of all five digits on held-out keys, with the weights as exported.

    python -m tidepool.deploy.demo.evaluate FOLDER [--prompts 200] [--lengths 2048 4096 8192]

Teacher forcing answers the same question as greedy decoding here: greedy decoding is right exactly where every digit is
the most likely one after the right digits before it. fp32, on the GPU where there is one.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import train_model as tm
from .data import ANSWER_LEN, EOS, Prompt, make_prompt
from .export import load

LENGTHS = (2048, 4096, 8192)
SELECTORS = {
    "indexer": tm.select_by_indexer,
    "dense": None,
    "random": tm.select_random,
    "recent": tm.select_recent,
}
MAX_TOKENS_PER_BATCH = 32768


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. Margin: median over answer digits of the top logit minus the second."""

    selector: str
    form: str
    num_tokens: int
    num_prompts: int
    recall: float
    ended: float
    margin: float


@torch.no_grad()
def measure(forward: tm.Forward, selector: str, form: str, num_tokens: int, count: int) -> Row:
    """Recall of `count` prompts of one kind; `ended` is the share whose next token after the answer is eos."""
    device = forward.weights["lm_head.weight"].device
    prompts = [make_prompt(num_tokens, 1000 + seed, form=form) for seed in range(count)]
    right, ended, margins = [], [], []
    for some in _batches(prompts, max(1, MAX_TOKENS_PER_BATCH // num_tokens)):
        tokens = torch.tensor([_answered(prompt) for prompt in some], device=device)
        hidden = forward(tokens, SELECTORS[selector]).hidden_ND.unflatten(0, tokens.shape)
        # The last tokens of a sequence are the digits, `;` and eos; each is predicted one place before.
        tail = ANSWER_LEN + 2
        logits = forward.logits(hidden[:, -tail - 1 : -1].flatten(0, 1)).unflatten(0, (-1, tail))
        hit = logits.argmax(-1) == tokens[:, -tail:]
        top = logits[:, :ANSWER_LEN].topk(2, -1).values
        right.append(hit[:, :ANSWER_LEN].all(1))
        ended.append(hit[:, ANSWER_LEN:].all(1))
        margins.append((top[..., 0] - top[..., 1]).flatten())
    shares = (torch.cat(x).float().mean().item() for x in (right, ended))
    return Row(selector, form, num_tokens, count, *shares, torch.cat(margins).median().item())


def _answered(prompt: Prompt) -> list[int]:
    return [*prompt.token_ids, *prompt.completion.encode(), EOS]


def _batches(prompts: list[Prompt], size: int) -> Iterator[list[Prompt]]:
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


def table(weights: tm.Weights, num_prompts: int, lengths: tuple[int, ...] = LENGTHS) -> list[Row]:
    """Indexer in both forms, then dense attention and the negative controls in raw form; prints each line."""
    forward = tm.Forward(weights, torch.float32)
    cases = [("indexer", "raw"), ("indexer", "chat")]
    cases += [(name, "raw") for name in ("dense", "random", "recent")]
    rows = []
    print(
        f"{'keys chosen by':<15}{'form':<6}{'tokens':>7}{'prompts':>9}{'recall':>9}{'ended':>9}{'margin':>9}"
    )
    for selector, form in cases:
        for num_tokens in lengths:
            row = measure(forward, selector, form, num_tokens, num_prompts)
            rows.append(row)
            print(
                f"{row.selector:<15}{row.form:<6}{row.num_tokens:>7}{row.num_prompts:>9}"
                f"{row.recall:>9.1%}{row.ended:>9.1%}{row.margin:>9.2f}",
                flush=True,
            )
    return rows


def write_rows(rows: list[Row], path: Path) -> None:
    """The table as JSON."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table(load(args.folder, device), args.prompts, tuple(args.lengths))


if __name__ == "__main__":
    main()
