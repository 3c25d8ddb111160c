"""What will be trained on, told before it costs anything: on the terminal and as a page."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megaman.buckets import Bucket, Fit, fit_of
from megaman.captions import Caption, odd_repeats, shared_captions, tag_frequencies, write_caption_set
from megaman.files import write_text
from megaman.pages import render_dataset
from megaman.pictures import duplicates
from megaman.survey import Fact, Skipped

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


@dataclass(frozen=True)
class Report:
    """The dataset as the training sees it."""

    folder: Path
    trigger: str
    rows: Sequence[Row]
    skipped: Sequence[Skipped]

    @cached_property
    def twins(self) -> list[tuple[Row, Row]]:
        """Pictures that look alike."""
        pairs = duplicates([row.fact.fingerprint for row in self.rows])
        return [(self.rows[first], self.rows[later]) for first, later in pairs]

    @cached_property
    def buckets(self) -> dict[Bucket, list[Row]]:
        """The pictures of each training size."""
        members: dict[Bucket, list[Row]] = {}
        for row in self.rows:
            members.setdefault(row.bucket, []).append(row)
        return dict(sorted(members.items()))

    @property
    def enlarged(self) -> list[Row]:
        """Pictures smaller than their training size, the smallest first."""
        return sorted((row for row in self.rows if row.fit.scale > 1.001), key=lambda row: -row.fit.scale)

    @property
    def too_long(self) -> list[Row]:
        """Captions whose end the text encoder does not see."""
        return [row for row in self.rows if row.tokens > MAX_TOKENS]

    @property
    def lacking(self) -> list[Row]:
        """Captions without the trigger."""
        return [row for row in self.rows if self.trigger.lower() not in row.caption.text.lower()]

    @cached_property
    def tags(self) -> dict[str, int]:
        """How often each comma-separated tag occurs, the most frequent first."""
        return tag_frequencies([row.caption.text for row in self.rows])

    def lines(self) -> list[str]:
        """What the user should know, a line each."""
        rows, derived = self.rows, sum(row.caption.source == "name" for row in self.rows)
        lines = [
            f"pictures: {len(rows)} in {self.folder}, {len(rows) - derived} captions from files, "
            f"{derived} from names"
        ]
        sizes = (f"{bucket} ({len(members)})" for bucket, members in self.buckets.items())
        lines.append(f"sizes: {', '.join(sizes)}")
        lines += [f"skipped: {self.below(file.path)}: {file.reason}" for file in self.skipped]
        for remark, count in Counter(remark for row in rows for remark in row.fact.remarks).most_common():
            lines.append(f"note: {count} {'picture' if count == 1 else 'pictures'}: {remark}")
        lines += [f"note: {first.name} and {later.name} look alike" for first, later in self.twins[:NAMED]]
        if len(self.twins) > NAMED:
            lines.append(f"note: {len(self.twins) - NAMED} more pairs look alike")
        if self.enlarged:
            worst = self.enlarged[0]
            lines.append(
                f"note: {len(self.enlarged)} pictures are smaller than they are trained at and will be "
                f"enlarged (most: {worst.name}, {worst.fit.scale:.1f} times)"
            )
        if self.too_long:
            lines.append(
                f"note: {len(self.too_long)} captions are longer than {MAX_TOKENS} tokens; the rest is not "
                f"read ({_named(self.too_long)})"
            )
        if self.lacking:
            lines.append(
                f"note: {len(self.lacking)} captions lack the trigger {self.trigger!r} "
                f"({_named(self.lacking)}); those pictures teach it nothing"
            )
        paths = [row.fact.path for row in rows]
        for name in odd_repeats(paths, self.folder):
            lines.append(f"note: the number of {name} is no count of repeats; its pictures count once")
        for sidecar, users in shared_captions(paths, [row.caption for row in rows]).items():
            lines.append(f"note: {self.below(sidecar)} is the caption of {len(users)} pictures")
        return [" ".join(line.split("\n")) for line in lines]  # a file's name may hold line breaks

    def below(self, path: Path) -> str:
        """A file's name as the user knows it."""
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else path.name

    def write(self, output: Path) -> Path:
        """Writes dataset.html and returns it."""
        page = output / "dataset.html"
        write_text(page, render_dataset(self, MAX_TOKENS))
        return page

    def offer_captions(self, folder: Path) -> list[Path]:
        """Writes every caption that was made from a name, to be edited and copied; what is there, stays."""
        made = [(Path(row.name), row.caption.text) for row in self.rows if row.caption.source == "name"]
        return write_caption_set(
            folder, [pair for pair in made if not (folder / pair[0].with_suffix(".txt")).exists()]
        )


def _named(rows: Sequence[Row]) -> str:
    names = [row.name for row in rows[:NAMED]]
    return ", ".join(names) + (", …" if len(rows) > NAMED else "")
