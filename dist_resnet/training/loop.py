"""The training loop: what happens at which step."""

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

from dist_resnet.base import signals, watchdog
from dist_resnet.base.errors import Diverged, Preempted
from dist_resnet.config.plan import Plan
from dist_resnet.config.schema import Config
from dist_resnet.data.stream import Batch
from dist_resnet.distributed.group import on_rank_zero
from dist_resnet.runs.diagnosis import LOW_RATE, Row, decline_threshold
from dist_resnet.step.captured import CapturedStep
from dist_resnet.step.state import TrainState
from dist_resnet.step.totals import Totals
from dist_resnet.step.train_step import TrainStep
from dist_resnet.tracking.tracker import Tracker
from dist_resnet.training.evaluation import Evaluation, Evaluator
from dist_resnet.training.gallery import Gallery
from dist_resnet.training.outputs import RunWriter
from dist_resnet.training.stopwatch import Stopwatch


@dataclass
class Trainer:
    """All that one rank's part of a run is made of."""

    config: Config
    plan: Plan
    state: TrainState
    train_step: TrainStep | CapturedStep
    batches: Generator[Batch, None, None]
    evaluate: Evaluator
    classes: tuple[str, ...]
    tracker: Tracker
    watch: Stopwatch
    writer: RunWriter | None
    """Writes checkpoints and the status; None on all ranks but the first."""
    gallery: Gallery | None = None
    """Shows pictures; None where W&B is off."""
    last_evaluation: dict[str, float | int] | None = None
    """The row of this process's last evaluation."""

    recorded: Sequence[Row] = ()
    """Rows of the state that this process goes on from."""
    begins_fork: bool = False
    """Whether that state is of a fork, and in no checkpoint yet."""

    def fit(self) -> None:
        """Train from `state.step` to the last step.

        What is due after a step has this order: a checkpoint holds all that was logged.

        Raises:
            Diverged: loss or gradient not finite; on all ranks at the same step.
            Preempted: a rank was asked to stop; the state is saved. On all ranks at the same step.
            UserError: the last checkpoint cannot be written.
        """
        plan, state = self.plan, self.state
        self.watch.start_window()
        if plan.finished(state.step):
            self._end_where_it_began()
        while not plan.finished(state.step) and not self._stopped_early():
            self._train_on_next_batch()
            done, improved = state.step, False
            last = plan.finished(done)
            if last or done % self.config.log.every_steps == 0:
                self._log(done)
            if last or plan.ends_epoch(done, 1):
                improved = self._end_epoch(done)
                last = self._end_early(done) or last
            stop = not last and self._stop_requested(done)
            if last or stop or improved or self._saves_at(done):
                self._save(done, improved, must=last or stop)
            if stop:
                reason = signals.received_name() or "a signal to another rank"
                raise Preempted(
                    f"stopped by {reason} at step {done}, saved; start again to continue"
                )

    def _end_where_it_began(self) -> None:
        """What was not done yet after the last step, of a run that was at its end already.

        It was stopped there by a signal or taken back there, or killed before its last save.
        """
        done = self.state.step
        if not any("train/loss" in row for row in self.recorded):
            self._log(done)
        row = next((row for row in self.recorded if "val/top1" in row), None)
        improved = self._end_epoch(done) if row is None else self._is_best(row, done)
        if row is None or improved or self.begins_fork:
            self._save(done, improved, must=True)

    def _train_on_next_batch(self) -> None:
        done, totals = self.state.step, self.state.totals
        if done % self.config.log.every_steps == 0:
            totals.begin(Totals.LOG)
        if done % self.plan.steps_per_epoch == 0:
            totals.begin(Totals.EPOCH)
        with self.watch.waiting_for_data():
            batch = next(self.batches)
        if self.gallery is not None:
            self.gallery.batch(self.state.step, batch)
        self.train_step(batch)
        self.state.stopped_early = False
        # From the first step's end on: that step may compile for minutes.
        watchdog.rearm(self.config.parallel.timeout_seconds)

    def _stopped_early(self) -> bool:
        return self.state.stopped_early and self.config.train.early_stop

    def _end_early(self, done: int) -> bool:
        """Whether train.early_stop ends the run here; then what is due at its end is logged."""
        row, due = self.last_evaluation, self.config.eval.every_epochs
        # A run that train.max_steps pauses here decides as one that goes on; not between epochs.
        if row is None or row["step"] != done or not self.plan.ends_epoch(done, due):
            return False
        if not (self._declines(row) and self.config.train.early_stop):
            return False
        self.state.stopped_early = done < len(self.train_step.rates)
        if self.plan.finished(done):
            return False
        self.tracker.message(
            f"train.early_stop: val/top1 has fallen clearly, from {self.state.best_at_low_rate:.4f}"
            f" at a low learning rate; ends at step {done:,} of {self.plan.total_steps:,}"
        )
        if done % self.config.log.every_steps:
            self._log(done)
        if self.gallery is not None:
            with self.watch.pause(), self.state.evaluated_weights():
                self._evaluate(done, at_end=True)
        return True

    def _declines(self, row: Mapping[str, float | int]) -> bool:
        """Whether accuracy has fallen clearly from its best at a low learning rate.

        Such is a decline of `runs.diagnosis.RULES`. A warm-up's low rates do not count; once past
        its peak no schedule rises again.
        """
        rates, state, step = self.train_step.rates, self.state, int(row["step"])
        if step <= rates.index(max(rates)) or rates[step - 1] >= LOW_RATE * max(rates):
            return False
        top1 = row["val/top1"]
        state.best_at_low_rate = max(state.best_at_low_rate, top1)
        return state.best_at_low_rate - top1 >= decline_threshold(top1, int(row["val/images"]))

    def _saves_at(self, done: int) -> bool:
        cadence = self.config.checkpoint
        by_step = bool(cadence.every_steps) and done % cadence.every_steps == 0
        return by_step or self.plan.ends_epoch(done, cadence.every_epochs)

    def _stop_requested(self, done: int) -> bool:
        """Whether any rank was asked to stop: the answer travels with the gradients.

        Reading it waits for a GPU, so there it is read only where the host waits anyway.
        """
        flag = self.state.flat.stop
        waits = done % self.config.log.every_steps == 0 or self.plan.ends_epoch(done, 1)
        if flag.is_cuda and not waits and not self._saves_at(done):
            return False
        return bool(flag > 0)

    def _log(self, done: int) -> None:
        """One row of training metrics. Here, and at evaluations and saves, the host waits."""
        means = self.state.totals.means(Totals.LOG)
        self._check_finite(done)
        row = self._row(done) | {"train/loss": means.loss}
        row |= {f"train/{name}": value for name, value in means.measures.items()}
        row["train/lr"] = self.train_step.rates[done - 1]
        row["train/grad_norm"] = means.grad_norm
        self.tracker.log(row | self.watch.end_window(self.plan.global_batch_size))
        if self.writer is not None:
            self.writer.heartbeat(done)

    def _end_epoch(self, done: int) -> bool:
        """Evaluate if due; whether the result is the best so far."""
        at_end = self.plan.finished(done)
        if not at_end and not self.plan.ends_epoch(done, self.config.eval.every_epochs):
            return False
        self._check_finite(done)
        with self.watch.pause(), self.state.evaluated_weights():
            result = self._evaluate(done, at_end)
        row = self._row(done) | {"val/images": result.images} | result.figures(self.classes)
        epoch = self.state.totals.means(Totals.EPOCH)
        train = epoch.measures["top1"] if epoch.steps else math.nan  # of an older version
        self.last_evaluation = row | {"gap/top1": train - result.top1}
        self.tracker.log(self.last_evaluation)
        if not math.isfinite(result.loss):
            self.tracker.message(
                f"warning: val/loss is not finite at step {done:,}: in evaluation the net gives "
                "logits that are no numbers; its val/top1 means nothing"
            )
        return self._is_best(self.last_evaluation, done)

    def _is_best(self, row: Row, done: int) -> bool:
        """Whether an evaluation is the best so far, which is then remembered."""
        loss, top1 = row["val/loss"], row["val/top1"]
        if loss is None or top1 is None or not math.isfinite(loss):
            return False
        if top1 <= self.state.best.get("val/top1", -1.0):
            return False
        self.state.best = {"val/top1": top1, "step": done}
        return True

    def _evaluate(self, done: int, at_end: bool) -> Evaluation:
        model, gallery = self.state.flat.model, self.gallery
        if gallery is None:
            return self.evaluate(model)
        epoch = round(done / self.plan.steps_per_epoch)
        result = self.evaluate(model, gallery.mistakes_at(epoch, at_end))
        gallery.evaluation(done, at_end, result, self.evaluate)
        return result

    def _row(self, done: int) -> dict[str, float | int]:
        return {
            "step": done,
            "epoch": done / self.plan.steps_per_epoch,
            "seconds": self.watch.seconds(),
        }

    def _check_finite(self, done: int) -> None:
        """Raise Diverged, on all ranks alike: they read equal values. Waits for the device."""
        bad = self.state.totals.bad_step()
        if bad is None:
            return
        last = self.writer and self.writer.store.newest_path()
        raise Diverged(
            f"diverged: loss or gradient not finite at step {bad + 1} (seen at step {done});"
            f" last good checkpoint: {last or 'none'}; try a lower optim.lr,"
            " schedule.warmup_epochs=5 or precision.dtype=fp32"
        )

    def _save(self, done: int, best: bool, must: bool) -> None:
        """Write a checkpoint on rank 0; where it `must` be, all ranks learn whether it was."""
        self._check_finite(done)

        def write() -> None:
            if self.writer is not None:
                with self.watch.pause():
                    self.writer.save(self.state, self.watch.seconds(), best, must)

        on_rank_zero(write) if must else write()
