"""What a run tells while it goes on: the progress bar, metrics.jsonl, TensorBoard, sample pictures and
the run's page. Nothing here steers the training.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from megaman.common.console import Exit, UserError, listed, say
from megaman.common.files import replacing, write_text
from megaman.common.output_folder import RunFolder, read_rows
from megaman.training.run_page import renew_page, sample_names, samples_of
from megaman.training.sampler import Position

SKIPS_IN_A_ROW = 20  # fp16's scaler skips a step now and then; after so many nothing is learned any more
NAMED = 8  # pictures named in an error
STEPS_A_LINE = 10  # metrics are read from the device once per so many steps
PLAIN_LINES = 10  # progress lines in all, where stderr is no terminal


@dataclass(frozen=True)
class StepResult:
    """One optimizer step as the loop saw it; tensors stay on the device."""

    number: int  # counted from 0
    loss: Tensor  # the mean over all its examples, on all processes
    grad_norm: Tensor
    learning_rates: Sequence[float]  # the UNet's and, if they are trained, the text encoders'
    was_skipped: Tensor  # bool; by fp16's scaler, after an overflow
    examples: Sequence[tuple[Sequence[Position], Tensor]]  # this process's, with the loss of each


class SilentTracker:
    """What all processes but the first do with the loop's news: they watch that numbers are finite."""

    def __init__(self, steps: range, names: Sequence[str]) -> None:
        """steps: those that this process does; names: of the pictures, for messages."""
        self.total = steps.stop
        self.names = names
        self.unread: list[StepResult] = []
        self.skips = 0

    def record(self, step: StepResult) -> None:
        """Keeps the step; waits for the device once per STEPS_A_LINE steps. UserError (exit 5) on numbers
        that aren't finite.
        """
        self.unread.append(step)
        done = step.number + 1
        if done % STEPS_A_LINE == 0 or done == self.total:
            self._tell(step, *self.check())

    def set_total(self, total: int) -> None:
        """The steps of the run are so many in all, as it has found out."""
        self.total = total

    def _tell(self, step: StepResult, mean_loss: float, norm: float) -> None:
        """Once per STEPS_A_LINE steps: the last of them, their mean loss, and its gradient's norm."""

    def record_validation(self, step: int, loss: float) -> None:
        """The loss on the pictures that are held out."""

    def record_dataset(self, told: Mapping[str, Any]) -> None:
        """What the run's page tells of the pictures."""

    def record_strengths(self, step: int, whole: float, blocks: Mapping[str, float]) -> None:
        """How much the adapter changes the weights that it touches: all of them, and block by block."""

    def has_samples(self, step: int) -> bool:
        """Whether the sample pictures of a step are filed, and on the run's page."""
        return False

    def latest_sample(self) -> Path | None:
        """The first picture of the last samples."""
        return None

    def show_samples(self, step: int, prompts: Sequence[str], images: Sequence[Image]) -> None:
        """Sample pictures of a step."""

    def close(self) -> None:
        """Flushes everything. Safe to call twice."""

    def check(self) -> tuple[float, float]:
        """The mean loss of the steps since the last look, and the last gradient's norm. UserError (exit 5)
        that names step and pictures where a number isn't finite.
        """
        if not self.unread:
            return 0.0, 0.0
        told = [(step.loss, step.grad_norm, step.was_skipped) for step in self.unread]
        device = told[0][0].device
        numbers = [torch.stack([each.to(device, torch.float32) for each in three]) for three in told]
        rows = torch.stack(numbers).tolist()  # the one device wait per log line
        for step, (loss, norm, was_skipped) in zip(self.unread, rows, strict=True):
            self._count_skips(step, bool(was_skipped))
            if not math.isfinite(loss) or not (math.isfinite(norm) or was_skipped):
                what = "gradient" if math.isfinite(loss) else "loss"
                raise UserError(
                    f"the {what} is not finite at step {step.number + 1} ({self._suspects(step)}); nothing "
                    "of it is saved. Lower --learning_rate, or use --mixed_precision no.",
                    Exit.NUMBERS,
                )
        self.unread.clear()
        return sum(loss for loss, *_ in rows) / len(rows), rows[-1][1]

    def _count_skips(self, step: StepResult, was_skipped: bool) -> None:
        """UserError (exit 5) when fp16's scaler no longer recovers."""
        self.skips = self.skips + 1 if was_skipped else 0
        if self.skips >= SKIPS_IN_A_ROW:
            raise UserError(
                f"{self.skips} steps in a row overflowed in fp16, up to step {step.number + 1} "
                f"({self._suspects(step)}); lower --learning_rate, or use --mixed_precision bf16 or no",
                Exit.NUMBERS,
            )

    def _suspects(self, step: StepResult) -> str:
        """The pictures whose loss isn't finite; all of the step's where each one's is."""
        positions = [position for share, losses in step.examples for position in share[: len(losses)]]
        finite = [ok for share, losses in step.examples for ok in losses.isfinite().tolist()[: len(share)]]
        bad = [position for position, ok in zip(positions, finite, strict=True) if not ok] or positions
        names = list(dict.fromkeys(self.names[position.picture] for position in bad))
        return f"pictures {listed(names, NAMED)}"


class Tracker(SilentTracker):
    """Records losses, learning rates and samples: progress bar, metrics.jsonl, TensorBoard. The loop never
    reads from it, except whether samples are there.
    """

    def __init__(
        self,
        run: RunFolder,
        steps: range,
        names: Sequence[str],
        pictures_a_step: int,
        *,
        logging_dir: Path | None,
        prompts: Sequence[str] = (),
    ) -> None:
        """What an interrupted run told beyond the first of the steps is forgotten. prompts: of its samples,
        where it was made before metrics.jsonl told of them.
        """
        super().__init__(steps, names)
        self.run = run
        self.pictures_a_step = pictures_a_step
        self.started = time.monotonic()
        self.rate_since = (self.started, steps.start)
        self.samples = _earlier_samples(run, steps.start, prompts)
        _forget_beyond(run.metrics, steps.start)
        self.metrics = run.metrics.open("a", encoding="utf-8")
        self.bar: tqdm | None = None
        self.writer: Any = None  # TensorBoard's, imported only where it is asked for
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=self.total, initial=steps.start, desc="training", unit="step", dynamic_ncols=True
            )
        if logging_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            # Where nothing can be written from the beginning on, that is an error: nothing is lost yet.
            self.writer = SummaryWriter(str(logging_dir), purge_step=steps.start + 1 if steps.start else None)

    def set_total(self, total: int) -> None:
        """The steps of the run are so many in all, as it has found out."""
        super().set_total(total)
        if not self.unread:  # finding it out is not training time
            self.rate_since = (time.monotonic(), self.rate_since[1])
        if self.bar is not None:
            self.bar.total = total
            self.bar.refresh()

    def _tell(self, step: StepResult, mean_loss: float, norm: float) -> None:
        done = step.number + 1
        line = {
            "step": done,
            "loss": mean_loss,
            "lr": step.learning_rates[0],
            **dict(zip(("lr_text_encoder",), step.learning_rates[1:], strict=False)),
            "grad_norm": norm if math.isfinite(norm) else None,  # fp16: the scaler skipped this step
            "images_per_s": self._rate(done),
            "seconds": round(time.monotonic() - self.started, 2),
        }
        if torch.cuda.is_available():
            line["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        self._write(line)
        shown = {name: value for name, value in line.items() if name not in ("step", "seconds")}
        self._plot({f"train/{name}": value for name, value in shown.items() if value is not None}, done)
        self._show(line)

    def _write(self, line: Mapping[str, Any]) -> None:
        self.metrics.write(json.dumps(line, allow_nan=False) + "\n")
        self.metrics.flush()

    def _plot(self, values: Mapping[str, Any], step: int) -> None:
        """Puts numbers and pictures (H,W,3) into TensorBoard. Where its log can't be written, the run goes on
        without it.
        """
        if self.writer is None:
            return
        try:
            for name, value in values.items():
                if isinstance(value, np.ndarray):
                    self.writer.add_image(name, value, step, dataformats="HWC")
                else:
                    self.writer.add_scalar(name, value, step)
        except OSError as error:  # its thread's, which is over
            self.writer = None
            self._say_without_tensorboard(error)

    def _say_without_tensorboard(self, error: OSError) -> None:
        reason = error.strerror or error
        self._say(f"note: TensorBoard's log can't be written ({reason}) and ends here")

    def _say(self, line: str) -> None:
        """Says a line above the bar, not into it."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            say(line)

    def record_validation(self, step: int, loss: float) -> None:
        """Records the loss on the pictures that are held out. UserError (exit 5) if it isn't finite."""
        if not math.isfinite(loss):
            raise UserError(
                f"the validation loss is not finite at step {step}; lower --learning_rate", Exit.NUMBERS
            )
        self._write({"step": step, "validation_loss": loss})
        self._plot({"validation/loss": loss}, step)
        self._say(f"validation loss {loss:.4f} at step {step}")
        self.rate_since = (time.monotonic(), step)  # measuring is not training time

    def record_dataset(self, told: Mapping[str, Any]) -> None:
        """Records what the run's page tells of the pictures."""
        self._write({"step": 0, "dataset": told})

    def record_strengths(self, step: int, whole: float, blocks: Mapping[str, float]) -> None:
        """Records how much the adapter changes the weights that it touches, and renews the run's page."""
        self._write({"step": step, "strength": whole, "block_strengths": blocks})
        renew_page(self.run)

    def _rate(self, done: int) -> float:
        then, before = self.rate_since
        self.rate_since = (time.monotonic(), done)
        return round((done - before) * self.pictures_a_step / max(1e-9, self.rate_since[0] - then), 2)

    def _show(self, line: dict[str, Any]) -> None:
        done = line["step"]
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
            self.bar.set_postfix_str(
                f"loss {line['loss']:.4f}, lr {line['lr']:.1e}, {line['images_per_s']:.1f} images/s"
            )
        elif (
            done == self.total
            or done * PLAIN_LINES // self.total > (done - STEPS_A_LINE) * PLAIN_LINES // self.total
        ):
            left = (self.total - done) * self.pictures_a_step / max(1e-9, line["images_per_s"])
            say(
                f"step {done}/{self.total} · loss {line['loss']:.4f} · lr {line['lr']:.1e} · "
                f"{line['images_per_s']:.1f} images/s · {int(left // 60)}:{int(left % 60):02} left"
            )

    def has_samples(self, step: int) -> bool:
        """Whether the sample pictures of a step are filed, and on the run's page."""
        return step in self.samples

    def latest_sample(self) -> Path | None:
        """The first picture of the last samples."""
        return self.run.samples / sample_names(max(self.samples), 1)[0] if self.samples else None

    def show_samples(self, step: int, prompts: Sequence[str], images: Sequence[Image]) -> None:
        """Files samples/step-000100/NN.png, puts them into TensorBoard and renews the run's page."""
        for name, image in zip(sample_names(step, len(images)), images, strict=True):
            with replacing(self.run.samples / name) as partial:
                image.save(partial, format="PNG")
        self.samples.add(step)
        self._write({"step": step, "samples": list(prompts)})  # last: now they are complete
        renew_page(self.run)
        self._plot({f"samples/{i:02}": np.asarray(image) for i, image in enumerate(images, 1)}, step)
        self.rate_since = (time.monotonic(), step)  # drawing is not training time

    def close(self) -> None:
        """Flushes everything, and renews the run's page. Safe to call twice."""
        if not self.metrics.closed:
            self.metrics.close()
            with contextlib.suppress(OSError):  # what ends the run is told, if it is a full disk as well
                renew_page(self.run)
        try:
            if self.writer is not None:
                self.writer.close()
        except OSError as error:  # of the last that it was given
            self._say_without_tensorboard(error)
        if self.bar is not None:
            self.bar.close()
        self.bar = None
        self.writer = None


def _forget_beyond(metrics: Path, step: int) -> None:
    """Drops the lines of steps that are done again, and half a line that a killed process left."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            kept += [line] if json.loads(line)["step"] <= step else []
        except (ValueError, KeyError, TypeError):
            continue
    write_text(metrics, "".join(f"{line}\n" for line in kept))


def _earlier_samples(run: RunFolder, step: int, prompts: Sequence[str]) -> set[int]:
    """The steps up to this one whose sample pictures are filed and told of: a killed run may have left some
    of a step's.
    """
    return {told for told in samples_of(run, read_rows(run.metrics), prompts) if told <= step}
