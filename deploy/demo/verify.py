"""Compares an exported checkpoint with transformers on CPU: the tokenizer, the chat template and fp32 logits.

    python -m tidepool.deploy.demo.verify [FOLDER]

Prints one line a check and exits with status 1 where one fails. A pick of the top-k that is nearly tied may fall
differently in two implementations and change later rows, so the check of logits says how many rows differ and asks
for 99 % of them, and for the same greedy token in all.
"""

import random
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, GlmMoeDsaForCausalLM

from . import train_model as tm
from .data import make_prompt
from .export import load

CHECKPOINT = Path(__file__).with_name("checkpoint")
TOLERANCE = 1e-3
CASES = ((600, "raw"), (1000, "chat"), (1500, "raw"))


def check_tokenizer(folder: Path) -> bool:
    """Any UTF-8 text survives the round trip as its bytes."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    rng = random.Random(0)
    texts = ["", " a  b\n\t", "\u00e9\u4e2d\U0001f30a\x00", "[KEY4]=12345; I'm n't"]
    texts += ["".join(chr(rng.randrange(1, 0xD800)) for _ in range(200)) for _ in range(20)]
    same = [_survives(tokenizer, text) for text in texts]
    print(f"tokenizer: {sum(same)} of {len(texts)} texts survive the round trip")
    prompts = [make_prompt(700, seed, form=form) for seed in range(3) for form in ("raw", "chat")]
    rendered = [_render(tokenizer, prompt) == prompt.token_ids for prompt in prompts]
    print(f"tokenizer: {sum(rendered)} of {len(prompts)} prompts render to their token ids")
    return all(same) and all(rendered)


def _survives(tokenizer, text: str) -> bool:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return ids == list(text.encode()) and tokenizer.decode(ids) == text


def _render(tokenizer, prompt) -> list[int]:
    if prompt.form == "raw":
        return tokenizer(prompt.text).input_ids
    text = tokenizer.apply_chat_template(
        prompt.messages, tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False).input_ids


@torch.no_grad()
def check_logits(folder: Path) -> bool:
    """fp32 logits of transformers and of the training module on the same weights."""
    theirs = GlmMoeDsaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    forward = tm.Forward(load(folder, torch.device("cpu")), torch.float32)
    passed = True
    for num_tokens, form in CASES:
        prompt = make_prompt(num_tokens, seed=1, form=form)
        ids = torch.tensor([prompt.token_ids + list(prompt.completion.encode())])
        expected = theirs(ids).logits[0]
        actual = forward.logits(forward(ids, tm.select_by_indexer).hidden_ND)
        rows = (actual - expected).abs().amax(-1)
        close = (rows <= TOLERANCE).float().mean().item()
        same = (actual.argmax(-1) == expected.argmax(-1)).float().mean().item()
        print(
            f"logits: {ids.numel()} tokens, {form}: median row {rows.median():.1e}, "
            f"worst {rows.max():.1e}, rows within {TOLERANCE}: {close:.2%}, greedy equal {same:.2%}"
        )
        passed = passed and close >= 0.99 and same >= 0.999
    return passed


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKPOINT
    passed = check_tokenizer(folder) & check_logits(folder)
    print("passed" if passed else "FAILED")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
