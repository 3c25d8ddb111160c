"""Programs that take turns: each in a process of its own, which waits while the others work.

The parent writes a question a line (JSON) to a worker's standard input and reads an answer a line; whatever
else a worker prints goes to its standard error, of which the last line tells why it failed. So two checkouts
of this project can be timed side by side, no one's memory is another's, and nobody inherits another's heap.
"""

import json
import math
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# a worker knows the project to be timed before this checkout's benches, which look for their own, are loaded
BOOT = """
import runpy, sys
sys.path.insert(0, {project!r})
import generate_megaman, megaman_lora
sys.argv = [{script!r}, "--serve", {settings!r}]
runpy.run_path({script!r}, run_name="__main__")
"""
START, TURNS = 0.6, 0.85  # shares of the time by whose end all are ready, and the last turn is over
Answers = Mapping[str, Callable[..., Any]]


class Failed(Exception):
    """A worker that ended, or took too long; the message is the last line that it wrote."""


class Deadline:
    """Until when something may take; for ever, if no seconds are given."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = math.inf if seconds is None else seconds
        self.end = time.monotonic() + self.seconds

    @property
    def left(self) -> float:
        """Seconds; never less than 0."""
        return max(0.0, self.end - time.monotonic())

    def part(self, share: float) -> "Deadline":
        """The deadline of a first share of it."""
        return Deadline(self.left - (1 - share) * self.seconds if math.isfinite(self.seconds) else None)


class Worker:
    """A bench script in a process of its own that answers questions. It is ready once `answer` returns."""

    def __init__(
        self, script: str, settings: Mapping[str, Any], project: Path = ROOT, *, hides_cards: bool = False
    ) -> None:
        """settings: what the script's `serve` gets. project: the checkout that it times."""
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  `close` closes it
        boot = BOOT.format(project=str(project), script=script, settings=json.dumps(settings))
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if hides_cards else {})
        self.process = subprocess.Popen(
            [sys.executable, "-c", boot], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            text=True, env=environment,
        )  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.put(line)
        self.lines.put(None)

    def ask(self, question: str, deadline: Deadline, **arguments: Any) -> Any:
        """The answer to a question. Failed if there is none."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([question, arguments]) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise Failed(self.last_words) from error
        return self.answer(deadline)

    def answer(self, deadline: Deadline) -> Any:
        """The next answer; the first one comes unasked, when the worker is ready."""
        try:
            line = self.lines.get(timeout=None if math.isinf(deadline.end) else deadline.left)
        except queue.Empty:
            raise Failed("the time was up") from None
        if line is None:
            self.process.wait()
            raise Failed(self.last_words)
        return json.loads(line)

    @property
    def last_words(self) -> str:
        """The last line of standard error that is no profiler's."""
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").splitlines()
        told = [line.strip() for line in lines if line.strip() and not line.startswith("USDT")]
        return told[-1][:300] if told else f"ended with {self.process.poll()} and said nothing"

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        self.log.close()


def serve(make: Callable[[dict[str, Any]], tuple[Any, Answers]], settings: str) -> None:
    """The worker's side: answers until the parent closes the pipe. make: from the settings, the facts that
    are told when all is ready, and what answers which question.
    """
    answers_go = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    facts, answers = make(json.loads(settings))
    print(json.dumps(facts), file=answers_go, flush=True)
    for line in sys.stdin:
        question, arguments = json.loads(line)
        print(json.dumps(answers[question](**arguments)), file=answers_go, flush=True)


class Contest:
    """Workers by name, of which those that fail drop out with a reason."""

    def __init__(self, deadline: Deadline) -> None:
        self.deadline = deadline
        self.workers: dict[str, Worker] = {}
        self.facts: dict[str, Any] = {}
        self.failed: dict[str, str] = {}

    def start(self, starters: Mapping[str, Callable[[], Worker]], *, together: bool) -> None:
        """Starts all, one when the one before is ready, or together. Who is not ready by START of the
        time has failed.
        """
        for name, starter in starters.items():
            self.workers[name] = starter()
            if not together:
                self._meet(name)
        for name in [*self.workers] if together else []:
            self._meet(name)

    def _meet(self, name: str) -> None:
        facts = self._of(name, lambda worker: worker.answer(self.deadline.part(START)))
        if facts is not None:
            self.facts[name] = facts

    def ask(self, name: str, question: str, **arguments: Any) -> Any:
        """One worker's answer; None if it has failed."""
        return self._of(name, lambda worker: worker.ask(question, self.deadline, **arguments))

    def _of(self, name: str, get: Callable[[Worker], Any]) -> Any:
        if name not in self.workers:
            return None
        try:
            return get(self.workers[name])
        except Failed as failure:
            self.failed[name] = str(failure)
            self.workers.pop(name).close()
            return None

    def turns(self, rounds: int, question: str, **arguments: Any) -> dict[str, list[float]]:
        """The answers of each to a question, asked in turn, round after round. Ends early, after a whole
        round, if another would not fit into the time that is left for turns.
        """
        answers: dict[str, list[float]] = {name: [] for name in self.workers}
        longest = 0.0
        for _ in range(rounds):
            began = time.monotonic()
            if longest and self.deadline.part(TURNS).left < 1.5 * longest:
                break
            for name in [*self.workers]:
                answer = self.ask(name, question, **arguments)
                if answer is not None:
                    answers[name].append(answer)
            longest = max(longest, time.monotonic() - began)
        return {name: values for name, values in answers.items() if values and name in self.workers}

    def close(self) -> None:
        """Ends every process."""
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()


# ---------------------------------------------------------------- numbers
def spread(values: list[float], digits: int = 4) -> dict[str, Any]:
    """Median and quartiles."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {
        "median": round(statistics.median(values), digits),
        "quartiles": [round(quartiles[0], digits), round(quartiles[2], digits)],
        "count": len(values),
    }


def ratio(ones: list[float], others: list[float]) -> float:
    """How many times as long one takes as the other: the median over the rounds, in which both stood under
    the same load.
    """
    return round(statistics.median(one / other for one, other in zip(ones, others, strict=False)), 4)
