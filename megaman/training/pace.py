"""How many steps a run by the clock (--max_minutes) has: its own speed, measured, and what follows from it.

Before the first step a few are computed and forgotten, which gives the first total, and with it the warm-up
and the rates. After a quarter the steps themselves have been measured: the total is fitted once more, then
fixed, and the run is one like any other. The rate goes on from where it is and comes to 0 at the new end.
"""

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from accelerate import Accelerator
from torch import nn

from megaman.common import clock
from megaman.common.console import say
from megaman.common.output_folder import RunFolder
from megaman.config.record import recorded
from megaman.config.train import TrainConfig
from megaman.model import compute
from megaman.training.encoding import CaptionReader
from megaman.training.resume import write_record
from megaman.training.schedule import begun, settled, text_encoder_stop_at
from megaman.training.tracker import SilentTracker

PREVIEW, LOSS, CHECKPOINT = "draw_samples", "validate", "save_checkpoint"  # the verbs beside the steps
TRIALS = 6  # steps that are computed and forgotten at most; the first one finds its memory, and is slow
SHARE_OF_TRIALS = 0.01  # of the time: so much of trials is enough
BYTES_A_SECOND = 2e8  # written and read again for its sum; where no checkpoint has been timed yet
BYTES_A_WEIGHT = 14  # of a checkpoint: the parameter, two moments, the small adapter
END_S = 1.0  # to close everything and leave
P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Pace:
    """What a run knows of its own speed. Part of every checkpoint as long as it decides anything."""

    spent_s: float = 0.0  # by earlier commands
    first_step_s: float = 0.0  # when the first step began, in seconds of the run
    trial_s: float = 0.0  # a step that was tried
    steps: int = 0  # that were measured, and
    steps_s: float = 0.0  # how long they took
    others: dict[str, list[float]] = field(default_factory=dict)  # verb -> how often, how long in all
    began: float = field(default_factory=clock.began)

    @classmethod
    def of(cls, facts: Mapping[str, Any], began: float) -> "Pace":
        """What a checkpoint's run had found out, if it went by the clock. began: when this command did."""
        return cls(**facts.get("pace", {}), began=began)

    def facts(self, cfg: TrainConfig) -> dict[str, Any]:
        """For a checkpoint; nothing once all is decided."""
        if cfg.max_minutes is None:
            return {}
        known = asdict(self) | {"spent_s": self.elapsed_s()}
        del known["began"]
        return {"pace": known}

    def elapsed_s(self) -> float:
        """How long the run has taken so far, with earlier commands."""
        return self.spent_s + time.monotonic() - self.began

    @property
    def step_s(self) -> float:
        """How long a step takes."""
        return self.steps_s / self.steps if self.steps else self.trial_s

    def of_others_s(self) -> float:
        """How long all that was not a step has taken."""
        return math.fsum(seconds for _, seconds in self.others.values())

    def mean_s(self, verb: str) -> float:
        """How long one of the others takes; 0 where it has never been done."""
        times, seconds = self.others.get(verb, (0, 0.0))
        return seconds / times if times else 0.0

    def note(self, verb: str, seconds: float) -> None:
        """One of the others has taken so long."""
        times, before = self.others.get(verb, (0, 0.0))
        self.others[verb] = [times + 1, before + seconds]


class Paced(Protocol):
    """What keeps a pace."""

    pace: Pace


R = TypeVar("R", bound=Paced)


def timed(do: Callable[Concatenate[R, P], T]) -> Callable[Concatenate[R, P], T]:
    """The same function of a run, whose time is noted in the run's pace."""

    @wraps(do)
    def measured(run: R, *args: P.args, **kwargs: P.kwargs) -> T:
        started = time.monotonic()
        made = do(run, *args, **kwargs)
        run.pace.note(do.__name__, time.monotonic() - started)
        return made

    return measured


class TimedRun(Protocol):
    """What is asked of a run here."""

    cfg: TrainConfig
    accelerator: Accelerator
    captions: CaptionReader
    pace: Pace

    @property
    def start(self) -> int:
        """Steps that an earlier command has done."""

    @property
    def folder(self) -> RunFolder:
        """Where everything goes."""

    @property
    def trainable(self) -> Mapping[str, nn.Parameter]:
        """The adapter's parameters."""


def steps(run: TimedRun, tracker: SilentTracker, attempt: Callable[[], object]) -> Iterator[int]:
    """The steps of a run, counted from 0. Under --max_minutes their number is decided on the way: before the
    first one, and after a quarter.

    attempt: computes a step, waits for the device, and forgets it.
    """
    pace = run.pace
    if run.cfg.max_minutes is not None and pace.trial_s == 0:
        _begin(run, tracker, attempt)
    step = run.start
    while True:
        if _is_due(run, step):
            _settle(run, tracker, step)
        if step >= run.cfg.max_train_steps:
            return
        started = time.monotonic() - pace.of_others_s()
        yield step
        pace.steps_s += time.monotonic() - pace.of_others_s() - started
        pace.steps += 1
        step += 1


def _begin(run: TimedRun, tracker: SilentTracker, attempt: Callable[[], object]) -> None:
    """Decides the first total, from steps that are tried."""
    run.pace.trial_s = _tried_s(run, attempt)
    run.pace.first_step_s = run.pace.elapsed_s()
    run.cfg = begun(run.cfg, _fitted(run, run.start))
    _put_into_force(run, tracker)
    say(f"time: {_told(run)}; measured again after a quarter")
    for_steps_s = run.cfg.max_train_steps * run.pace.step_s
    if for_steps_s < _budget_s(run.cfg) / 2:
        whole = f"--max_minutes {run.cfg.max_minutes:g}: {for_steps_s:.0f} s of it are left for steps"
        say(f"note: {whole}; loading, sample pictures and saving take the rest")


def _tried_s(run: TimedRun, attempt: Callable[[], object]) -> float:
    """How long a step takes, by as few as will do: the median of all but the first, which is slow."""
    enough_s = SHARE_OF_TRIALS * _budget_s(run.cfg)
    taken: list[float] = []
    while not compute.is_agreed(len(taken) == TRIALS or sum(taken[1:]) > enough_s, run.accelerator):
        started = time.monotonic()
        attempt()
        taken.append(time.monotonic() - started)
        if compute.is_agreed(taken[0] > 5 * enough_s, run.accelerator):
            break
    later = sorted(taken[1:] or taken)
    return later[len(later) // 2]


def _is_due(run: TimedRun, step: int) -> bool:
    """Whether the total is to be fixed: a quarter of the steps is done, or of the time that was left for
    them.
    """
    minutes = run.cfg.max_minutes
    if minutes is None or step == 0:
        return False
    pace, first = run.pace, run.pace.first_step_s
    is_quarter = pace.elapsed_s() - first >= (_budget_s(run.cfg) - first) / 4
    return compute.is_agreed(is_quarter or step >= run.cfg.max_train_steps // 4, run.accelerator)


def _settle(run: TimedRun, tracker: SilentTracker, step: int) -> None:
    """Fixes the total, after `step` steps, and records it: an earlier total, and this one."""
    started = time.monotonic()
    compute.wait_for(run.accelerator.device)
    run.pace.steps_s += time.monotonic() - started
    total = _fitted(run, step)
    told = _told(run)
    run.cfg = settled(run.cfg, step, total)
    _put_into_force(run, tracker)
    if run.accelerator.is_main_process:
        write_record(run.folder, recorded(run.cfg))
    say(f"time: {told} by now; {total} in all, which is fixed")


def _told(run: TimedRun) -> str:
    return (
        f"{run.pace.step_s:.3g} s a step, {run.cfg.max_train_steps} steps in {run.cfg.max_minutes:g} minutes"
    )


def _put_into_force(run: TimedRun, tracker: SilentTracker) -> None:
    tracker.set_total(run.cfg.max_train_steps)
    if run.cfg.text_encoder_lr:
        run.captions.trained_until = text_encoder_stop_at(run.cfg)


# ---------------------------------------------------------------- the total


def _budget_s(cfg: TrainConfig) -> float:
    return 60 * (cfg.max_minutes or 0.0)


def _fitted(run: TimedRun, at: int) -> int:
    """The total with which the command ends in time, where `at` steps are done; at least one more, unless
    these were all. The first process decides, all follow.
    """
    cfg, pace = run.cfg, run.pace
    fewest = 0 if at >= cfg.max_train_steps else 1
    weights = sum(parameter.numel() for parameter in run.trainable.values())
    checkpoint_s = pace.mean_s(CHECKPOINT) or weights * BYTES_A_WEIGHT / BYTES_A_SECOND
    left_s = _budget_s(cfg) - pace.elapsed_s() - checkpoint_s - END_S  # the adapter's files are read again

    def takes_s(total: int) -> float:
        looks = _times(at, total, cfg.validation_steps)
        saved = _times(at, total, cfg.save_steps)
        both = _times(at, total, math.lcm(cfg.validation_steps, cfg.save_steps))
        losses_s = (looks + saved - both) * pace.mean_s(LOSS)
        others_s = looks * pace.mean_s(PREVIEW) + losses_s + saved * checkpoint_s
        return (total - at) * pace.step_s + others_s

    most = at + 1 + max(0, int(left_s / max(pace.step_s, 1e-6)))
    total = at + max(fewest, bisect_right(range(at + 1, most + 1), left_s, key=takes_s))
    return compute.said_by_all(total, run.accelerator)[0]


def _times(at: int, total: int, interval: int) -> int:
    """How often something is done after `at` steps that is done every `interval` steps and after the last."""
    return total // interval - at // interval + (total % interval > 0)
