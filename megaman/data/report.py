"""What will be trained on, told before it costs anything: on the terminal and as a page."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from megaman.common.console import one_line
from megaman.common.files import check_page, write_text
from megaman.common.html import render_dataset
from megaman.data.buckets import Bucket, Crop, Fit, fit_of
from megaman.data.captions import (
    Caption,
    holds,
    odd_repeats,
    shared_captions,
    tag_frequencies,
    write_caption_set,
)
from megaman.data.pictures import duplicates
from megaman.data.scan import Fact, Skipped
from megaman.model import stable_diffusion as base
from megaman.training.sampler import Stream

MAX_TOKENS = 75  # Stable Diffusion reads 77, two of them mark the beginning and the end
NAMED = 5  # files named in a line; the page names all


@dataclass(frozen=True)
class Row:
    """One usable picture with its caption and where it is trained."""

    name: str  # below the data folder, with slashes
    fact: Fact
    caption: Caption
    bucket: Bucket
    repeats: int
    tokens: int

    @property
    def fit(self) -> Fit:
        """The part that is seen when it is cut in the middle."""
        return fit_of(self.fact.size, self.bucket)


class Settings(Protocol):
    """What the report asks of the settings; the training script's DataFlags have it."""

    trigger: str
    crop: Crop
    flip: bool


@dataclass(frozen=True)
class Report:
    """The dataset as the training sees it.

    counted_exactly: whether the tokens are the base's own; the embedded base's vocabulary, which stands in
    where the base is not at hand yet, is smaller and makes more of them.
    """

    folder: Path
    settings: Settings
    rows: Sequence[Row]
    skipped: Sequence[Skipped]
    counted_exactly: bool = True

    @cached_property
    def alike(self) -> list[list[Row]]:
        """Groups of pictures that look alike."""
        groups: dict[int, list[Row]] = {}
        facts = [row.fact for row in self.rows]
        for first, later in duplicates([fact.fingerprint for fact in facts], [fact.size for fact in facts]):
            groups.setdefault(first, [self.rows[first]]).append(self.rows[later])
        return list(groups.values())

    @cached_property
    def buckets(self) -> dict[Bucket, list[Row]]:
        """The pictures of each training size."""
        members: dict[Bucket, list[Row]] = {}
        for row in self.rows:
            members.setdefault(row.bucket, []).append(row)
        return dict(sorted(members.items()))

    @property
    def derived(self) -> list[Row]:
        """Pictures whose caption was made from their name."""
        return [row for row in self.rows if row.caption.source == "name"]

    @property
    def enlarged(self) -> list[Row]:
        """Pictures smaller than their training size, the smallest first."""
        return sorted((row for row in self.rows if row.fit.scale > 1.001), key=lambda row: -row.fit.scale)

    @property
    def too_long(self) -> list[Row]:
        """Captions whose end the text encoder does not see."""
        return [row for row in self.rows if row.tokens > MAX_TOKENS]

    @cached_property
    def lacking(self) -> list[Row]:
        """Captions without the trigger."""
        return [row for row in self.rows if not holds(row.caption.text, self.settings.trigger)]

    @cached_property
    def tags(self) -> dict[str, int]:
        """How often each comma-separated tag occurs, the most frequent first."""
        return tag_frequencies([row.caption.text for row in self.rows])

    def lines(self) -> list[str]:
        """What the user should know, a line each."""
        derived = len(self.derived)
        from_files = _count(len(self.rows) - derived, "caption")
        lines = [
            f"pictures: {len(self.rows)} in {self.folder}, {from_files} from files, {derived} from names"
        ]
        sizes = (f"{bucket} ({len(members)})" for bucket, members in self.buckets.items())
        ways = {"bucket": "", "center": ", cut in the middle", "random": ", cut at random places"}
        mirrored = ", also mirrored" if self.settings.flip else ""
        lines.append(f"sizes: {', '.join(sizes)}{ways[self.settings.crop]}{mirrored}")
        if derived:
            lines.append(
                f"captions: from names: {_listed(f'{r.name} “{r.caption.text}”' for r in self.derived)}"
            )
        lines += [f"skipped: {self.below(file.path)}: {file.reason}" for file in self.skipped]
        lines += [f"note: {note}" for note in (*self._about_pictures(), *self._about_captions())]
        return [one_line(line) for line in lines]

    def _about_pictures(self) -> list[str]:
        notes = []
        with_remark: dict[str, list[Row]] = {}
        for row in self.rows:
            for remark in row.fact.remarks:
                with_remark.setdefault(remark, []).append(row)
        for remark, rows in sorted(with_remark.items(), key=lambda item: -len(item[1])):
            notes.append(f"{_count(len(rows), 'picture')}: {remark} ({_named(rows)})")
        notes += [f"look alike: {_named(group)}" for group in self.alike[:NAMED]]
        if len(self.alike) > NAMED:
            notes.append(f"look alike: {_count(len(self.alike) - NAMED, 'more group')} in dataset.html")
        if self.enlarged:
            worst = self.enlarged[0]
            notes.append(
                f"{_count(len(self.enlarged), 'picture')} smaller than the training size, enlarged to it "
                f"(at most {worst.fit.scale:.1f} times: {worst.name})"
            )
        for name in odd_repeats([row.fact.path for row in self.rows], self.folder):
            notes.append(f"the number of {name} is no count of repeats; its pictures count once")
        return notes

    def _about_captions(self) -> list[str]:
        notes = []
        if self.too_long:
            doubt = (
                "" if self.counted_exactly else " (a high estimate: the base's vocabulary is not here yet)"
            )
            notes.append(
                f"{_count(len(self.too_long), 'caption')} longer than {MAX_TOKENS} tokens{doubt}; what is "
                f"over is not read ({_named(self.too_long)})"
            )
        if self.lacking:
            lacking = f"{_count(len(self.lacking), 'caption')} without the trigger {self.settings.trigger!r}"
            notes.append(f"{lacking}, which learns nothing from there ({_named(self.lacking)})")
        captions = [row.caption for row in self.rows]
        for sidecar, users in shared_captions([row.fact.path for row in self.rows], captions).items():
            notes.append(f"{self.below(sidecar)} is the caption of {len(users)} pictures")
        return notes

    def below(self, path: Path) -> str:
        """A file's name as the user knows it."""
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else path.name

    def write(self, output: Path) -> Path:
        """Writes dataset.html and returns it. UserError (exit 7) if another's page of that name is there."""
        page = output / "dataset.html"
        check_page(page)
        html = render_dataset(self, MAX_TOKENS)
        write_text(page, html.encode("utf-8", "backslashreplace").decode())  # names may be any bytes
        return page

    def offer_captions(self, folder: Path) -> list[str]:
        """Writes every caption that was made from a name, to be edited and copied; what is there, stays. What
        to tell of it, a line each.
        """
        made, kept = write_caption_set(folder, [(Path(row.name), row.caption.text) for row in self.derived])
        lines = []
        if made:
            lines.append(
                f"captions made from names lie in {folder}: edit them and copy them to your pictures"
            )
        if kept:
            lines.append(f"{_count(len(kept), 'caption')} of an earlier dry run left as found in {folder}")
        return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _named(rows: Sequence[Row]) -> str:
    return _listed(row.name for row in rows)


def _listed(names: Iterable[str]) -> str:
    """The first few; the page names all."""
    first = list(islice(names, NAMED + 1))
    return ", ".join(first[:NAMED]) + (", …" if len(first) > NAMED else "")


def describe_plan(cfg: Any, stream: Stream) -> str:
    """The arithmetic of the run, in a line. cfg: the training script's TrainConfig, its steps decided."""
    return (
        f"plan: {cfg.max_train_steps} steps of {stream.step_size} pictures = "
        f"{cfg.max_train_steps / stream.steps_an_epoch:.1f} epochs of {len(stream)}; rank {cfg.lora_rank}, "
        f"alpha {cfg.lora_alpha:g}, learning rate {cfg.learning_rate:g}"
    )


def report_of(dataset: Any) -> Report:
    """What the user should know of a dataset: the training script's MegaManDataset, with a tokenizer."""
    rows = [
        Row(
            path.relative_to(dataset.folder).as_posix(),
            dataset.facts[i],
            dataset.captions[i],
            dataset.buckets[i],
            dataset.repeats[i],
            len(dataset.tokenizer(dataset.captions[i].text).input_ids) - 2,
        )
        for i, path in enumerate(dataset.paths)
    ]
    borrowed = Path(dataset.tokenizer.name_or_path).parent == base.EMBEDDED_FOLDER
    own = base.canonical_name(dataset.settings.pretrained_model_name) == base.EMBEDDED
    return Report(dataset.folder, dataset.settings, rows, dataset.skipped, own or not borrowed)
