"""What a run tells while it goes on: the progress bar, metrics.jsonl, TensorBoard, sample pictures and
their page. Nothing here steers the training.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from megaman.errors import NUMBERS, UserError, say
from megaman.files import replacing, write_text
from megaman.pages import render_samples

STEPS_A_LINE = 10  # metrics are read from the device once per so many steps
PLAIN_LINES = 10  # progress lines in all, where stderr is no terminal


class Watch:
    """Write-only: the loop tells it tensors and pictures, it tells the user."""

    def __init__(
        self,
        output_dir: Path,
        total_steps: int,
        pictures_a_step: int,
        *,
        logging_dir: Path | None,
        enabled: bool,
    ) -> None:
        self.output_dir, self.enabled = output_dir, enabled
        self.total, self.pictures_a_step = total_steps, pictures_a_step
        self.losses: list[Tensor] = []
        self.rate_since = (time.monotonic(), 0)
        self.started = time.monotonic()
        self.samples: dict[int, list[str]] = {}
        self.writer = self.bar = self.metrics = None
        if not enabled:
            return
        self.metrics = (output_dir / "metrics.jsonl").open("a", encoding="utf-8")
        if sys.stderr.isatty():
            self.bar = tqdm(total=total_steps, desc="training", unit="step", dynamic_ncols=True)
        if logging_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(logging_dir))

    def record(self, step: int, loss: Tensor, grad_norm: Tensor, learning_rate: float) -> None:
        """One optimizer step (counted from 0).

        Keeps the tensors; waits for the device once per STEPS_A_LINE steps. UserError (exit 5) on a
        loss that isn't finite.
        """
        self.losses.append(loss)
        done = step + 1
        if done % STEPS_A_LINE and done != self.total:
            return
        means = torch.stack([torch.stack(self.losses).mean(), grad_norm.float()])
        mean_loss, norm = means.tolist()  # the one device wait per log line
        self.losses.clear()
        if not math.isfinite(mean_loss):
            raise UserError(
                f"the loss is not finite at step {done}; nothing of it is saved. Lower --learning_rate, "
                "or use --mixed_precision no.",
                NUMBERS,
            )
        if not self.enabled:
            return
        line = {
            "step": done,
            "loss": mean_loss,
            "lr": learning_rate,
            "grad_norm": norm if math.isfinite(norm) else None,  # fp16: the scaler skipped this step
            "images_per_s": self._rate(done),
            "seconds": round(time.monotonic() - self.started, 2),
        }
        if torch.cuda.is_available():
            line["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        self.metrics.write(json.dumps(line, allow_nan=False) + "\n")
        self.metrics.flush()
        if self.writer:
            for name, value in line.items():
                if name not in ("step", "seconds") and value is not None:
                    self.writer.add_scalar(f"train/{name}", value, done)
        self._show(line)

    def _rate(self, done: int) -> float:
        then, before = self.rate_since
        self.rate_since = (time.monotonic(), done)
        return round((done - before) * self.pictures_a_step / max(1e-9, self.rate_since[0] - then), 2)

    def _show(self, line: dict[str, Any]) -> None:
        done = line["step"]
        if self.bar:
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

    def show_samples(self, step: int, prompts: Sequence[str], images: Sequence[Image]) -> None:
        """Files samples/step-000100/NN.png, puts them into TensorBoard and renews samples/index.html."""
        if not self.enabled:
            return
        folder = self.output_dir / "samples"
        names = [f"step-{step:06}/{i:02}.png" for i in range(1, len(images) + 1)]
        for name, image in zip(names, images, strict=True):
            with replacing(folder / name) as partial:
                image.save(partial, format="PNG")
        self.samples[step] = names
        write_text(folder / "index.html", render_samples(list(prompts), self.samples, images[0].size))
        if self.writer:
            import numpy as np

            for i, image in enumerate(images):
                self.writer.add_image(f"samples/{i + 1:02}", np.asarray(image), step, dataformats="HWC")
        self.rate_since = (time.monotonic(), step)  # drawing is not training time

    def close(self) -> None:
        """Flushes everything. Safe to call twice."""
        for sink in (self.bar, self.metrics, self.writer):
            if sink is not None:
                sink.close()
        self.bar = self.metrics = self.writer = None
