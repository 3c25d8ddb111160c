"""A Chromium without a window, for tests of what pages do; driven over its debugging pipe, in real time."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--lang=en-US")
LONGEST_S = 60  # for an answer, on a busy machine


class NoBrowser(Exception):
    """There is none that can be driven here."""


class Browser:
    """One page of a running Chromium."""

    def __init__(self, requests: int, answers: int) -> None:
        self.requests, self.answers, self.unread, self.number = requests, answers, b"", 0
        self.events: list[dict[str, Any]] = []  # of those that were asked for, such as a request of the page
        self.session: str | None = None
        page = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a message of Chromium's debugging protocol."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        try:
            os.write(self.requests, json.dumps(message).encode() + b"\0")
        except BrokenPipeError as error:
            raise AssertionError("Chromium ended") from error
        while (answer := self._next_message()).get("id") != self.number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _next_message(self) -> dict[str, Any]:
        until = time.monotonic() + LONGEST_S
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.answers], [], [], max(0, until - time.monotonic()))
            chunk = os.read(self.answers, 1 << 16) if ready else b""
            if not chunk:
                raise AssertionError("Chromium gives no answer")
            self.unread += chunk
        message, self.unread = self.unread.split(b"\0", 1)
        return json.loads(message)

    def open(self, page: Path) -> None:
        """Shows a page and waits until it is loaded."""
        self.ask("Page.navigate", url=page.as_uri())
        loaded = f"location.href === {json.dumps(page.as_uri())} && document.readyState === 'complete'"
        until = time.monotonic() + LONGEST_S
        while not self.run(loaded):
            assert time.monotonic() < until, f"{page} does not load"
            time.sleep(0.01)

    def run(self, script: str) -> Any:
        """What an expression comes to in the page, when its promise is kept."""
        answer = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A running browser that remembers nothing of earlier ones. NoBrowser where there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None or os.name == "nt":  # Windows hands pipes on in another way
        raise NoBrowser("no Chromium that can be driven here")
    import fcntl

    (read, requests), (answers, write) = os.pipe(), os.pipe()

    def place_pipes() -> None:  # Chromium reads at 3 and writes at 4
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read, write)]
        for end, place in zip(ends, (3, 4), strict=True):
            os.dup2(end, place)

    process = subprocess.Popen(
        [program, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False, preexec_fn=place_pipes,
    )  # fmt: skip
    os.close(read)
    os.close(write)
    try:
        try:
            page = Browser(requests, answers)
        except AssertionError as error:
            raise NoBrowser("Chromium does not start here") from error
        yield page
    finally:
        process.terminate()
        process.wait(LONGEST_S)
        os.close(requests)
        os.close(answers)
