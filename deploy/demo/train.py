"""Trains the demo model on one GPU in minutes and writes its checkpoint.

    python -m tidepool.deploy.demo.train --corpus .corpus --out OUT --seconds 430 --compile

Phases: dense attention on short, then longer sequences; indexer warm-up (the rest frozen); sparse attention over the
indexer's top-k. Each has a share of the time and may end early when recall on the training batches is reached. After
each phase OUT/state.pt (fp32 weights) is written, from which `--resume` goes on with `--first-stage`. One thread, one
stream; the device is waited for every SYNC_EVERY steps.
"""

import argparse
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import train_model as tm
from .batches import ANSWER, TEXT, Batch, BatchMaker
from .corpus import read_training_text
from .evaluate import LENGTHS, table, write_rows
from .export import export, load
from .index_loss import index_loss, sample_rows

SYNC_EVERY = 8
LOG_SECONDS = 5.0
WARMUP_STEPS = 100
ROUTER_BIAS_STEP = 1e-3
RECALL_MEMORY = 0.7


@dataclass(frozen=True, slots=True)
class Stage:
    """One phase. `until` is the share of all seconds at which it ends; it ends before that where recall on the longest
    sequences passes `leave_at`, and not before the last stage's end while recall is under `need`. Rates: (start, end)."""

    name: str
    lengths: tuple[int, ...]
    until: float
    model_rate: tuple[float, float]
    index_rate: tuple[float, float] = (0.0, 0.0)
    leave_at: float = 2.0
    need: float = 0.0

    @property
    def is_sparse(self) -> bool:
        return self.name == "sparse"

    @property
    def trains_model(self) -> bool:
        return self.model_rate[0] > 0

    @property
    def trains_indexer(self) -> bool:
        return self.index_rate[0] > 0


STAGES = (
    Stage("short", (256, 512), 0.42, (3e-3, 2.4e-3), leave_at=0.97, need=0.6),
    Stage("medium", (512, 2048), 0.52, (2.4e-3, 1.5e-3), leave_at=0.985, need=0.6),
    Stage("long", (512, 2048, 8192), 0.68, (1.5e-3, 3e-4)),
    Stage("indexer", (512, 2048, 8192), 0.78, (0.0, 0.0), (3e-3, 1e-3)),
    Stage("sparse", (512, 2048, 8192), 1.0, (8e-4, 5e-5), (1e-3, 1e-4)),
)
SMOKE_STAGES = (
    Stage("short", (256, 512), 0.2, (3e-3, 2.4e-3)),
    Stage("long", (1024,), 0.4, (1.5e-3, 3e-4)),
    Stage("indexer", (1024,), 0.7, (0.0, 0.0), (3e-3, 1e-3)),
    Stage("sparse", (512, 1024), 1.0, (8e-4, 5e-5), (1e-3, 1e-4)),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line chose."""

    corpus: Path
    out: Path
    seconds: float
    tokens: int
    index_rows: int
    seed: int
    compiled: bool
    stages: tuple[Stage, ...]
    num_prompts: int
    lengths: tuple[int, ...]


def losses(
    hidden_ND: Tensor,
    targets_N: Tensor,
    purpose_N: Tensor,
    norm: Tensor,
    head: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss on text, mean loss on answers, and which targets are the most likely token [N]."""
    logits = tm.linear(tm.rms_norm(hidden_ND, norm).to(dtype), head).float()
    loss = F.cross_entropy(logits, targets_N, reduction="none")
    is_text, is_answer = (purpose_N == TEXT).float(), (purpose_N == ANSWER).float()
    text_loss = (loss * is_text).sum() / is_text.sum()
    answer_loss = (loss * is_answer).sum() / is_answer.sum()
    return text_loss, answer_loss, logits.argmax(-1) == targets_N


class Trainer:
    """Weights, optimizer and the state of one run."""

    def __init__(self, settings: Settings, weights: tm.Weights, started: float) -> None:
        self.settings, self.weights, self.started = settings, weights, started
        device = weights["lm_head.weight"].device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.forward = tm.Forward(weights, dtype, settings.compiled)
        self.plain_forward = tm.Forward(weights, dtype)
        self.losses = torch.compile(losses, dynamic=False) if settings.compiled else losses
        self.maker = BatchMaker(read_training_text(settings.corpus), settings.seed, device)
        self.choices = random.Random(settings.seed)
        self.optimizer = _make_optimizer(weights)
        self.num_steps = 0
        self.last_log = 0.0
        self.pending: list[tuple[int, Tensor]] = []
        self.recall: dict[int, float] = {}

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def run_stage(self, stage: Stage) -> None:
        """Steps until the stage's time is over or its recall is reached."""
        start, end = self.elapsed, stage.until * self.settings.seconds
        self.recall.clear()
        while self.elapsed < end or self._must_stay(stage):
            progress = min(1.0, (self.elapsed - start) / max(end - start, 1e-9))
            length = self.choices.choice(stage.lengths)
            metrics = self._step(stage, length, progress)
            self.pending.append((length, metrics))
            self.num_steps += 1
            if self.num_steps % SYNC_EVERY == 0:
                self._read_metrics(stage)
                if self._recall(stage) >= stage.leave_at:
                    break
        self._read_metrics(stage, force=True)
        torch.save(
            {k: v.detach().cpu() for k, v in self.weights.items()}, self.settings.out / "state.pt"
        )

    def _must_stay(self, stage: Stage) -> bool:
        return self._recall(stage) < stage.need and self.elapsed < self.settings.seconds

    def _recall(self, stage: Stage) -> float:
        return self.recall.get(max(stage.lengths), 0.0)

    def _step(self, stage: Stage, length: int, progress: float) -> Tensor:
        """One update; returns text loss, answer loss, recall and index loss as one tensor on the device."""
        self._set_rates(stage, progress)
        batch = self.maker.make(self.settings.tokens, length)
        model_step = self._model_loss if stage.trains_model else self._frozen_model
        text_loss, answer_loss, recall, output = model_step(stage, batch)
        loss, kl = text_loss + answer_loss, torch.zeros_like(recall)
        if stage.trains_indexer:
            rows = sample_rows(
                batch.special, max(1, self.settings.index_rows * length // self.settings.tokens)
            )
            kl = index_loss(output.states, rows, length)
            loss = loss + kl
        loss.backward()
        for group in self.optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if stage.trains_model:
            self._balance_experts(output.expert_loads)
        return torch.stack([t.detach() for t in (text_loss, answer_loss, recall, kl)])

    def _model_loss(self, stage: Stage, batch: Batch) -> tuple[Tensor, Tensor, Tensor, tm.Output]:
        selector = tm.select_by_indexer if stage.is_sparse else None
        output = self.forward(batch.inputs, selector, keep_states=stage.trains_indexer)
        ends = self.weights["model.norm.weight"], self.weights["lm_head.weight"]
        targets, purpose = batch.targets.flatten(), batch.purpose.flatten()
        text_loss, answer_loss, correct = self.losses(
            output.hidden_ND, targets, purpose, *ends, self.forward.dtype
        )
        return text_loss, answer_loss, correct[batch.digit_index].all(1).float().mean(), output

    @torch.no_grad()
    def _frozen_model(self, stage: Stage, batch: Batch) -> tuple[Tensor, Tensor, Tensor, tm.Output]:
        """The dense model's states for the indexer to learn from; its own losses are not wanted."""
        output = self.plain_forward(batch.inputs, keep_states=True)
        zero = output.hidden_ND.new_zeros(())
        return zero, zero, zero, output

    def _set_rates(self, stage: Stage, progress: float) -> None:
        warm = min(1.0, (self.num_steps + 1) / WARMUP_STEPS)
        for group in self.optimizer.param_groups:
            high, low = stage.index_rate if group["is_indexer"] else stage.model_rate
            group["lr"] = warm * (low + (high - low) * (1 + math.cos(math.pi * progress)) / 2)

    @torch.no_grad()
    def _balance_experts(self, loads: list[Tensor]) -> None:
        """Moves the correction biases towards experts that got fewer tokens."""
        for layer in range(tm.NUM_DENSE_LAYERS, tm.NUM_LAYERS):
            bias = self.weights[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
            load = loads[layer]
            bias.add_(ROUTER_BIAS_STEP * (load.mean() - load).sign())

    def _read_metrics(self, stage: Stage, force: bool = False) -> None:
        """Waits for the device, folds what is pending into the averages, prints a line now and then."""
        if not self.pending:
            return
        values = torch.stack([metrics for _, metrics in self.pending]).tolist()
        for (length, _), (_, _, recall, _) in zip(self.pending, values, strict=True):
            old = self.recall.get(length, recall)
            self.recall[length] = RECALL_MEMORY * old + (1 - RECALL_MEMORY) * recall
        means = [sum(column) / len(values) for column in zip(*values, strict=True)]
        self.pending.clear()
        if force or self.elapsed - self.last_log >= LOG_SECONDS:
            self.last_log = self.elapsed
            recalls = " ".join(f"{n}:{r:.3f}" for n, r in sorted(self.recall.items()))
            rate = self.optimizer.param_groups[0]["lr"]
            print(
                f"{self.elapsed:6.1f} s step {self.num_steps:5d} {stage.name:8s} lr {rate:.1e} text {means[0]:.3f} "
                f"answer {means[1]:.3f} index {means[3]:.3f} recall {recalls}",
                flush=True,
            )


def _make_optimizer(weights: tm.Weights) -> torch.optim.Optimizer:
    """AdamW over three groups: matrices, everything else of the model, and the indexers."""
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, tensor in weights.items():
        if tensor.requires_grad:
            is_indexer = ".indexer." in name
            decays = tensor.dim() == 2 and not is_indexer and "embed" not in name
            groups.setdefault((is_indexer, decays), []).append(tensor)
    params = [
        {"params": tensors, "is_indexer": is_indexer, "weight_decay": 0.05 if decays else 0.0}
        for (is_indexer, decays), tensors in groups.items()
    ]
    fused = weights["lm_head.weight"].is_cuda
    return torch.optim.AdamW(params, lr=0.0, betas=(0.9, 0.95), fused=fused)


def train(settings: Settings, weights: tm.Weights, started: float) -> None:
    """Runs the stages, exports, and evaluates what was exported."""
    settings.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(settings, weights, started)
    for stage in settings.stages:
        trainer.run_stage(stage)
    folder = settings.out / "checkpoint"
    export(weights, folder)
    print(f"{trainer.elapsed:6.1f} s exported; evaluating", flush=True)
    device = weights["lm_head.weight"].device
    rows = table(load(folder, device), settings.num_prompts, settings.lengths)
    write_rows(rows, settings.out / "evaluation.json")
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    print(f"{trainer.elapsed:6.1f} s done, peak device memory {peak:.1f} GiB", flush=True)


def parse() -> tuple[Settings, Path | None]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--seconds", type=float, default=430.0, help="for training; evaluation adds about a minute"
    )
    parser.add_argument("--tokens", type=int, default=131072, help="tokens a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--resume", type=Path, help="a state.pt to start from")
    parser.add_argument("--first-stage", help="skip the stages before this one")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny stages, to try the script on a CPU"
    )
    args = parser.parse_args()
    stages = SMOKE_STAGES if args.smoke else STAGES
    first = [stage.name for stage in stages].index(args.first_stage) if args.first_stage else 0
    tokens = 2048 if args.smoke else args.tokens
    settings = Settings(
        corpus=args.corpus,
        out=args.out,
        seconds=args.seconds,
        tokens=tokens,
        index_rows=tokens // 16,
        seed=args.seed,
        compiled=args.compile,
        stages=stages[first:],
        num_prompts=4 if args.smoke else 200,
        lengths=(1024,) if args.smoke else LENGTHS,
    )
    return settings, args.resume


def main() -> None:
    started = time.monotonic()
    settings, resume = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(settings.seed)
    if settings.compiled:
        torch._dynamo.config.suppress_errors = True
        tm.weigh_heads = torch.compile(tm.weigh_heads, dynamic=True)
    weights = tm.init_weights(settings.seed, device)
    if resume:
        for name, tensor in torch.load(resume, map_location=device).items():
            weights[name].data.copy_(tensor)
    train(settings, weights, started)


if __name__ == "__main__":
    main()
