"""The loop: batches in, checkpoints and metrics out, resumable at any step; knows no command line, loads no target."""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from dflash_core.errors import TrainingError
from dflash_core.model import DFlashDraftModel
from dflash_core.training import report, state
from dflash_core.training.data import Batch, BatchStream, DrawSettings, PackedData
from dflash_core.training.objective import DraftObjective
from dflash_core.training.optimizers import make_optimizers
from dflash_core.training.schedule import Clock, Schedule
from dflash_core.training.settings import TrainSettings
from dflash_core.training.source import InputSource
from dflash_core.training.walk import Replies, Score, score


@dataclass
class Progress:
    """Where a run is: optimiser steps done, the next row, seconds used, tokens seen, the best acceptance length."""

    step: int = 0
    epoch: int = 0
    number: int = 0
    seconds: float = 0.0
    tokens: int = 0
    best_tau: float = 0.0


@dataclass(frozen=True)
class Story:
    """What the model card tells besides the numbers."""

    target: str
    data: dict[str, Any]
    start: str


class Trainer:
    """Trains `objective.draft` until the clock says the run is over, or this process's pause."""

    def __init__(
        self, settings: TrainSettings, accelerator: Accelerator, objective: DraftObjective, source: InputSource,
        data: PackedData, draw: DrawSettings, replies: Replies, clock: Clock, fingerprint: dict[str, Any], story: Story,
        compile: bool,
    ) -> None:  # fmt: skip
        self.settings, self.accelerator, self.objective, self.source = settings, accelerator, objective, source
        self.data, self.draw, self.replies, self.clock = data, draw, replies, clock
        self.fingerprint, self.story = fingerprint, story
        self.output, self.progress = Path(settings.output), Progress()
        self.schedule = Schedule(settings.schedule, settings.warm_up, settings.decay)
        self.params = list(objective.draft.parameters())
        made = make_optimizers(settings, objective.draft, compile)
        self.model, *prepared = accelerator.prepare(objective, *made.values())
        self.optimizers = dict(zip(made, prepared, strict=True))
        self._base_lrs = {name: made[name].param_groups[0]["lr"] for name in made}
        self._average = [p.detach().clone() for p in self.params] if settings.ema else None
        self._pending: list[tuple[Batch, Tensor]] = []
        self._logged_at, self._pending_steps = time.monotonic(), 0
        self._last_score: dict[str, Any] | None = None
        self._scored_step = -1

    # ---- the loop

    def run(self) -> bool:
        """Train; returns whether the run is over (False: paused). The state is saved either way."""
        self.metrics = report.Metrics(self.output, self.progress.step) if self._is_main else None
        if self.progress.step == 0:
            self.save()
        stream = BatchStream(
            self.data, self.draw, self.accelerator.device, self.progress.epoch, self.progress.number,
            self.accelerator.process_index, self.accelerator.num_processes,
        )  # fmt: skip
        try:
            while not self._over and not self._paused:
                self._train_step(stream)
                self._housekeeping()
        finally:
            stream.close()
        over = self._over
        self._flush()
        if over and self._scored_step != self.progress.step:
            self.evaluate()
        self.save()
        return over

    def _train_step(self, batches: Iterable[Batch]) -> None:
        share = self._set_rates()
        rows = iter(batches)
        for _ in range(self.settings.accumulate):
            batch = next(rows)
            with self.accelerator.accumulate(self.model):
                loss, counts = self.model(self.source.inputs(batch))
                self.accelerator.backward(loss)
                norm = None
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.params, self.settings.clip)
                for optimizer in self.optimizers.values():
                    optimizer.step()
                    optimizer.zero_grad()
            self._note(batch, loss.detach(), counts, norm)
        if self._average is not None:
            torch._foreach_lerp_(self._average, [p.detach() for p in self.params], 1.0 - self.settings.ema)
        self.progress.step += 1
        self._pending_steps += 1
        self._rate = share

    def _note(self, batch: Batch, loss: Tensor, counts: Tensor, norm: Tensor | None) -> None:
        gradient = torch.zeros_like(loss) if norm is None else norm.detach()
        self._pending.append((batch, torch.cat((loss.float()[None], gradient.float()[None], counts.flatten().float()))))
        self.progress.epoch, self.progress.number = batch.pack.epoch, batch.pack.number + 1
        self.progress.tokens += self.accelerator.num_processes * int((batch.pack.document >= 0).sum())

    def _set_rates(self) -> float:
        """Set every learning rate for the next step; returns the factor. All processes follow the first one's clock."""
        factor = self.schedule.factor(self._share())
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self._base_lrs[name] * factor
        return factor

    def _share(self) -> float:
        share = self.clock.progress(self.progress.step)
        if self.accelerator.num_processes > 1:
            share = broadcast(torch.tensor([share], device=self.accelerator.device)).item()
        self._current_share = share
        return share

    @property
    def _over(self) -> bool:
        return self._share() >= 1.0

    @property
    def _paused(self) -> bool:
        limit = self.settings.pause_minutes
        paused = limit is not None and self.clock.process_seconds >= 60.0 * limit - self.clock.reserve_seconds
        if self.accelerator.num_processes > 1:
            paused = bool(broadcast(torch.tensor([int(paused)], device=self.accelerator.device)).item())
        return paused

    def _housekeeping(self) -> None:
        step, settings = self.progress.step, self.settings
        if step % settings.log_every == 0:
            self._flush()
        if step % settings.evaluate_every == 0:
            self._flush()
            self.evaluate()
        if step % settings.save_every == 0:
            self._flush()
            self.save()

    # ---- numbers

    def _flush(self) -> None:
        """Fetch the pending losses, stop at the first that is no number, write one metric line."""
        if not self._pending:
            return
        rows = torch.stack([values for _, values in self._pending]).cpu()
        # With a loss scaler an infinite gradient is a step that it skips, not an end.
        watched = 2 if self.accelerator.scaler is None else 1
        for (batch, _), values in zip(self._pending, rows, strict=True):
            if not values[:watched].isfinite().all():
                self._stop_at(batch, float(values[0]))
        now = time.monotonic()
        drafted = (rows.shape[1] - 2) // 2
        right, live = rows[:, 2 : 2 + drafted].sum(0), rows[:, 2 + drafted :].sum(0)
        if self.metrics is not None:
            self.metrics.add(
                "step",
                self.progress.step,
                epoch=self.progress.epoch,
                minutes=round(self.clock.seconds / 60, 3),
                loss=rows[:, 0].mean().item(),
                gradient_norm=rows[:, 1].max().item(),
                rate=round(self._rate, 5),
                step_seconds=round((now - self._logged_at) / self._pending_steps, 5),
                right_by_slot=[round(x, 4) for x in (right / live.clamp(min=1)).tolist()],
                live_slots=round(live.sum().item() / max(1, len(self._pending)), 1),
                gpu_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            )
        self._pending, self._pending_steps, self._logged_at = [], 0, now

    def _stop_at(self, batch: Batch, loss: float) -> None:
        pack = batch.pack
        raise TrainingError(
            "The loss is no longer a number.",
            f"It is {loss} at step {self.progress.step} or shortly before, epoch {pack.epoch}, row {pack.number},"
            f" sequences {list(pack.documents[:8])}{'...' if len(pack.documents) > 8 else ''}.",
            "The last good checkpoint is kept. Look at these sequences, or start --init-from it with a lower --lr.",
        )

    # ---- checkpoints

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process

    def weights(self) -> dict[str, Tensor]:
        """Training weights, unwrapped."""
        return {name: p.detach() for name, p in self.objective.draft.named_parameters()}

    def shipped_weights(self) -> dict[str, Tensor]:
        """Public weights: the average where one is kept, tap scales folded in."""
        names = [name for name, _ in self.objective.draft.named_parameters()]
        kept = self._average if self._average is not None else list(self.weights().values())
        return self.objective.export(dict(zip(names, kept, strict=True)))

    def evaluate(self) -> None:
        """Acceptance length of the weights as they would be shipped; keeps the best."""
        self.accelerator.wait_for_everyone()
        self._scored_step = self.progress.step
        if not self._is_main:
            return
        began, found = time.monotonic(), self.shipped_score()
        record = {**found.record(), "replies": len(self.replies), "max_new_tokens": self.settings.held_out_tokens}
        self._last_score = record
        seconds = time.monotonic() - began
        assert self.metrics is not None
        self.metrics.add(
            "evaluation",
            self.progress.step,
            minutes=round(self.clock.seconds / 60, 3),
            seconds=round(seconds, 2),
            **record,
        )
        tau = found.overall.tau or 0.0
        split = "  ".join(f"{name} {tally.tau:.2f}" for name, tally in sorted(found.categories.items()) if tally.tau)
        self.accelerator.print(f"step {self.progress.step}: tau {tau:.3f}  ({split})", flush=True)
        self.clock.reserve_seconds = max(5.0, 2.0 * seconds + 5.0)
        self._save_draft("last")
        if tau > self.progress.best_tau:
            self.progress.best_tau = tau
            state.copy_draft(self.output / "last", self.output / "best")
        report.plot(self.output)
        self._logged_at = time.monotonic()

    def shipped_score(self) -> Score:
        draft, reader = self.objective.draft, self.source.reader
        rounded = DFlashDraftModel(draft.config)
        rounded.load_state_dict({name: t.to(torch.bfloat16) for name, t in self.shipped_weights().items()})
        rounded = rounded.to(draft.fc.weight.device, reader.target.dtype).eval()
        return score(
            rounded,
            reader,
            self.replies,
            self.settings.context_tokens,
            self._anchors_of_evaluation,
            self.objective.use_flex,
        )

    @property
    def _anchors_of_evaluation(self) -> int:
        return max(self.settings.anchors, self.settings.held_out_tokens)

    def _save_draft(self, name: str) -> None:
        config = self.objective.draft.config
        progress = {"steps": self.progress.step, "minutes": self.clock.seconds / 60, "tokens": self.progress.tokens}
        shown = {
            k: v for k, v in asdict(self.settings).items() if k not in ("output", "data", "prompts", "target", "device")
        }
        text = report.card(
            self.story.target, config, self.story.data, shown, progress, self._last_score, self.story.start
        )
        state.save_draft(self.output / name, config, self.shipped_weights(), text)

    def save(self) -> None:
        """Write the state and the newest draft; what a kill loses is what came after."""
        self.accelerator.wait_for_everyone()
        if not self._is_main:
            return
        self.progress.seconds = self.clock.seconds
        weights = self.weights()
        if self._average is not None:
            weights |= {f"average.{name}": kept for name, kept in zip(self.weights(), self._average, strict=True)}
        facts = {"run": self.fingerprint, "progress": asdict(self.progress), "evaluation": self._last_score,
                 "tap_scale": self.objective.tap_scale[:: self.objective.draft.config.hidden_size].tolist(),
                 "config": self.objective.draft.config.to_dict(), "start": self.story.start}  # fmt: skip
        inner = {name: optimizer.optimizer for name, optimizer in self.optimizers.items()}
        state.save_state(self.output, self.progress.step, weights, inner, facts)
        self._save_draft("last")
        self.source.flush()
        self._logged_at = time.monotonic()

    @torch.no_grad()
    def restore(self, folder: Path, facts: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Continue from a saved state; the draft's own weights are already in place."""
        self.progress = Progress(**facts["progress"])
        self._last_score = facts["evaluation"]
        if self._average is not None:
            for (name, _), kept in zip(self.objective.draft.named_parameters(), self._average, strict=True):
                kept.copy_(weights[f"average.{name}"])
        state.load_optimizers(folder, {name: optimizer.optimizer for name, optimizer in self.optimizers.items()})
