"""What will be trained on, told before it costs anything: on the terminal and as a page."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megaman.common.console import NAMED, count, listed, one_line, shell_quoted
from megaman.common.files import followed, write_text
from megaman.common.html import check_page, render
from megaman.common.output_folder import CONTENT, PAGE
from megaman.config.train import DataFlags
from megaman.data.buckets import Bucket, Fit, fit_of
from megaman.data.caption_set import (
    caption_files,
    copy_caption_set,
    note_pictures,
    pictures_behind,
    write_caption_set,
)
from megaman.data.captions import (
    Caption,
    captions_of_nobody,
    concepts_of,
    has_trigger,
    mirrored,
    odd_repeats,
    shared_captions,
    tag_frequencies,
)
from megaman.data.folder import Listing
from megaman.data.scan import ScannedPicture, Skipped, content_of, duplicates
from megaman.data.tags import MadeCaptions

MUCH_IS_CUT = 0.35  # of a picture, outside the frame; a photo of 3:2 in a square loses a third


@dataclass(frozen=True)
class TrainedPicture:
    """One usable picture with its caption and where it is trained."""

    name: str  # below the data folder, with slashes
    scanned: ScannedPicture
    caption: Caption
    bucket: Bucket
    repeats: int
    tokens: int

    @property
    def fit(self) -> Fit:
        """The part of the picture that a centred cut keeps."""
        return fit_of(self.scanned.size, self.bucket)

    @property
    def cut_off(self) -> float:
        """The share of the picture that lies outside the frame."""
        width, height = self.scanned.size
        return 1 - (self.fit.right - self.fit.left) * (self.fit.bottom - self.fit.top) / (width * height)

    @property
    def is_missed(self) -> bool:
        """Whether the frame misses all that the picture's mask lets count."""
        if self.scanned.mask is None:
            return False
        left, top, right, bottom = self.scanned.mask.box
        beside = right <= self.fit.left or left >= self.fit.right
        return beside or bottom <= self.fit.top or top >= self.fit.bottom


@dataclass(frozen=True)
class Report:
    """The dataset as the training sees it.

    listing: all that lies in its folder. made: captions from the pictures, with --caption_with.
    """

    listing: Listing
    settings: DataFlags
    pictures: Sequence[TrainedPicture]
    skipped: Sequence[Skipped]
    made: MadeCaptions = MadeCaptions()

    @property
    def folder(self) -> Path:
        """The data folder."""
        return self.listing.folder

    @cached_property
    def alike(self) -> list[list[TrainedPicture]]:
        """Groups of pictures that look alike."""
        groups: dict[int, list[TrainedPicture]] = {}
        facts = [picture.scanned for picture in self.pictures]
        for first, later in duplicates(
            [scanned.fingerprint for scanned in facts], [scanned.size for scanned in facts]
        ):
            groups.setdefault(first, [self.pictures[first]]).append(self.pictures[later])
        return list(groups.values())

    @cached_property
    def buckets(self) -> dict[Bucket, list[TrainedPicture]]:
        """The pictures of each training size."""
        members: dict[Bucket, list[TrainedPicture]] = {}
        for picture in self.pictures:
            members.setdefault(picture.bucket, []).append(picture)
        return dict(sorted(members.items()))

    @property
    def captioned_from_name(self) -> list[TrainedPicture]:
        """Pictures whose caption was made from their name."""
        return [picture for picture in self.pictures if picture.caption.source == "name"]

    @property
    def enlarged(self) -> list[TrainedPicture]:
        """Pictures smaller than their training size, the smallest first."""
        return sorted(
            (picture for picture in self.pictures if picture.fit.scale > 1.001),
            key=lambda picture: -picture.fit.scale,
        )

    @property
    def much_cut(self) -> list[TrainedPicture]:
        """Pictures of which much is never seen, the most first. Windows at random places see all in time."""
        cut = [] if self.settings.crop == "random" else [p for p in self.pictures if p.cut_off > MUCH_IS_CUT]
        return sorted(cut, key=lambda picture: -picture.cut_off)

    @property
    def masked(self) -> list[TrainedPicture]:
        """Pictures of which not everything counts alike."""
        return [picture for picture in self.pictures if picture.scanned.mask is not None]

    @property
    def teaching_nothing(self) -> list[TrainedPicture]:
        """Pictures whose frame misses all that their mask lets count."""
        return [] if self.settings.crop == "random" else [p for p in self.masked if p.is_missed]

    @property
    def too_long(self) -> list[TrainedPicture]:
        """Captions whose end the text encoder does not see."""
        return [picture for picture in self.pictures if picture.tokens > self.settings.max_tokens]

    @cached_property
    def without_trigger(self) -> list[TrainedPicture]:
        """Captions without the trigger."""
        return [
            picture
            for picture in self.pictures
            if not all(has_trigger(text, self.settings.trigger) for text in picture.caption.wordings)
        ]

    @property
    def sides_exchanged(self) -> list[TrainedPicture]:
        """Captions that say another thing of the mirrored picture, where pictures are mirrored."""
        trigger = self.settings.trigger
        whole = ((picture, picture.caption.whole) for picture in self.pictures if self.settings.flip)
        return [picture for picture, text in whole if mirrored(text, trigger) != text]

    @cached_property
    def tags(self) -> dict[str, int]:
        """How often each comma-separated tag occurs, the most frequent first."""
        return tag_frequencies([picture.caption.text for picture in self.pictures])

    @cached_property
    def made_tags(self) -> dict[str, int]:
        """How often each tag occurs in captions from the pictures; none of sentences."""
        texts = [made.text for made in self.made.by_picture.values()]
        return tag_frequencies(texts) if self.made.are_tags else {}

    @property
    def summary(self) -> dict[str, Any]:
        """What the run's page tells of the pictures: how many there are, of what sizes, with what flaws."""
        return {
            "pictures": len(self.pictures),
            "sizes": {str(bucket): len(members) for bucket, members in self.buckets.items()},
            "captions made from names": len(self.captioned_from_name),
            "captions without the trigger": len(self.without_trigger),
            "captions that are too long": len(self.too_long),
            "masked": len(self.masked),
            "enlarged": len(self.enlarged),
            "look alike": sum(map(len, self.alike)),
            "skipped": len(self.skipped),
            CONTENT: content_of(picture.scanned.digest for picture in self.pictures),
        }

    def lines(self) -> list[str]:
        """What the terminal shows before the training, a line each."""
        derived = len(self.captioned_from_name)
        from_files = count(len(self.pictures) - derived, "caption")
        lines = [
            f"pictures: {len(self.pictures)} in {self.folder}, {from_files} from files, {derived} from names"
        ]
        sizes = (f"{bucket} ({len(members)})" for bucket, members in self.buckets.items())
        ways = {"bucket": "", "center": ", cut in the middle", "random": ", cut at random places"}
        turned = ", also mirrored" if self.settings.flip else ""
        if exchanged := self.sides_exchanged:
            turned += f", left and right exchanged in {count(len(exchanged), 'caption')}"
        lines.append(f"sizes: {', '.join(sizes)}{ways[self.settings.crop]}{turned}")
        lines += self._about_masks()
        if derived:
            made = (f"{picture.name} “{picture.caption.text}”" for picture in self.captioned_from_name)
            lines.append(f"captions: from names: {listed(made)}")
        lines += [f"skipped: {self.relative(file.path)}: {file.reason}" for file in self.skipped]
        lines += self.listing.left_out_lines
        lines += [f"note: {note}" for note in (*self._about_pictures(), *self._about_captions())]
        return [one_line(line) for line in lines]

    def _about_masks(self) -> list[str]:
        shares = [mask.share for picture in self.masked if (mask := picture.scanned.mask) is not None]
        if shares:
            of_each = f"of each {sum(shares) / len(shares):.0%} counts in the mean"
            return [f"masks: {count(len(shares), 'picture')}; {of_each}, and no loss is counted elsewhere"]
        nothing = "no picture is transparent, and none has a NAME.mask.png beside it"
        return [f"masks: none; {nothing} (--alpha_mask)"] if self.settings.alpha_mask else []

    def _about_pictures(self) -> list[str]:
        notes = []
        with_remark: dict[str, list[TrainedPicture]] = {}
        for picture in self.pictures:
            for remark in picture.scanned.remarks:
                with_remark.setdefault(remark, []).append(picture)
        for remark, pictures in sorted(with_remark.items(), key=lambda item: -len(item[1])):
            notes.append(f"{count(len(pictures), 'picture')}: {remark} ({_named(pictures)})")
        notes += [f"look alike: {_named(group)}" for group in self.alike[:NAMED]]
        if len(self.alike) > NAMED:
            notes.append(f"look alike: {count(len(self.alike) - NAMED, 'more group')} in dataset.html")
        if self.enlarged:
            worst = self.enlarged[0]
            notes.append(
                f"{count(len(self.enlarged), 'picture')} smaller than the training size, enlarged to it "
                f"(at most {worst.fit.scale:.1f} times: {worst.name})"
            )
        if cut := self.much_cut:
            remedy = ", or take --crop bucket" if self.settings.crop == "center" else ""
            notes.append(
                f"{count(len(cut), 'picture')} with more than a third cut off (at most {cut[0].cut_off:.0%}: "
                f"{cut[0].name}); cut out by hand what is to be learned{remedy}"
            )
        if missed := self.teaching_nothing:
            notes.append(
                f"{count(len(missed), 'picture')} with nothing in the frame that its mask lets count, which "
                f"teaches nothing ({_named(missed)})"
            )
        if (inner := self.listing.kohya_pictures) is not None:
            flag = f"--data_dir {shell_quoted(str(inner))}"
            notes.append(f"{self.folder} is kohya's project folder, and its pictures lie deeper: {flag}")
        for name in odd_repeats([picture.scanned.path for picture in self.pictures], self.folder):
            notes.append(f"the number of {name} is no count of repeats; its pictures count once")
        return notes

    def _about_captions(self) -> list[str]:
        notes = []
        if self.too_long:
            longer = f"longer than {self.settings.max_tokens} tokens; what is over is not read"
            notes.append(f"{count(len(self.too_long), 'caption')} {longer} ({_named(self.too_long)})")
        if self.without_trigger:
            lacking = (
                f"{count(len(self.without_trigger), 'caption')} without the trigger {self.settings.trigger!r}"
            )
            notes.append(f"{lacking}, which learns nothing from there ({_named(self.without_trigger)})")
        concepts = concepts_of([p.scanned.path for p in self.captioned_from_name], self.folder)
        if len(concepts) > 1:
            shown = f"{count(len(concepts), 'concept')} of kohya's folders ({listed(concepts)})"
            notes.append(f"{shown}: captions from names call them all {self.settings.trigger!r}")
        paths = [picture.scanned.path for picture in self.pictures]
        captions = [picture.caption for picture in self.pictures]
        for sidecar, users in shared_captions(paths, captions).items():
            notes.append(f"{self.relative(sidecar)} is the caption of {len(users)} pictures")
        if several := [picture for picture in self.pictures if picture.caption.others]:
            notes.append(
                f"{count(len(several), 'caption')} of several lines, each a caption of its own: every draw "
                f"takes one ({_named(several)})"
            )
        if lost := captions_of_nobody(self.listing, paths, captions):
            notes.append(f"{count(len(lost), 'text')} that no picture has for a caption: {listed(lost)}")
        return notes

    def relative(self, path: Path) -> str:
        """A file's path below the data folder."""
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else path.name

    def write(self, output: Path) -> Path:
        """Writes dataset.html and returns it. UserError (exit 7) if another's page of that name is there."""
        page = output / PAGE
        check_page(page)
        write_text(
            followed(page), self.html().encode("utf-8", "backslashreplace").decode()
        )  # names may be any bytes
        return page

    def html(self) -> str:
        """The page: every picture with what of it is seen, its caption and remarks."""
        return render("dataset.html.j2", report=self, max_tokens=self.settings.max_tokens)

    @property
    def _offered(self) -> list[tuple[Path, str]]:
        """Of each picture without a caption of its own, the words that were made of it, or of its name."""
        made = self.made.by_picture
        return [
            (Path(each.name), made[each.name].text if each.name in made else each.caption.text)
            for each in self.captioned_from_name
        ]

    @property
    def _taken(self) -> set[Path]:
        """The .txt that would speak for a picture with a caption of its own, out of metadata.jsonl."""
        return {
            Path(each.name).with_suffix(".txt") for each in self.pictures if each.caption.source == "file"
        }

    def offer_captions(self, folder: Path) -> list[str]:
        """Writes every caption that was made, to be edited and copied; what is there, stays. What to tell of
        it, a line each.
        """
        by_picture = self.made.by_picture
        from_names = {Path(p.name): p.caption.text for p in self.captioned_from_name if p.name in by_picture}
        made, kept = write_caption_set(folder, self._offered, from_names, self._taken)
        contents = self._contents()
        if made:
            of_made = (file.relative_to(folder).as_posix() for file in made)
            note_pictures(folder, {file: contents[file] for file in of_made})
        known = pictures_behind(folder)
        of_others = [file for file in contents if folder / file in kept and known.get(file) != contents[file]]
        of = "the pictures" if by_picture else "names"
        lines = []
        if made:
            copying = "edit them and copy them to your pictures (--dry_run --write_captions does)"
            lines.append(f"captions made from {of} lie in {folder}: {copying}")
        if found := len(kept) - len(of_others):
            again = "; delete those that you want anew" if by_picture else ""
            lines.append(f"{count(found, 'caption')} of an earlier dry run left as found in {folder}{again}")
        return lines + _about_others(of_others, folder)

    def _contents(self) -> dict[str, list[str]]:
        """The pictures, by content, that each caption's file is for, below the folder of captions."""
        digests = {Path(picture.name): picture.scanned.digest for picture in self.pictures}
        found: dict[str, list[str]] = {}
        files = caption_files(self._offered, self._taken)
        for (picture, _), (file, _) in zip(self._offered, files, strict=True):
            found.setdefault(file.as_posix(), []).append(digests[picture])
        return {file: sorted(each) for file, each in found.items()}

    def copy_captions(self, folder: Path) -> list[str]:
        """Copies the captions that `offer_captions` has put there for these very pictures beside them, where
        none lies. What to tell of it, a line each.
        """
        contents = self._contents()
        known = pictures_behind(folder)
        there = [file for file in contents if os.path.lexists(folder / file)]
        own = [Path(file) for file in there if known.get(file) == contents[file]]
        new, kept = copy_caption_set(folder, own, self.folder)
        lines = [f"{count(len(new), 'caption')} written beside the pictures in {self.folder}"]
        if contents and not there:
            lines.append(f"no captions lie in {folder} yet: make them with --dry_run, and edit them")
        lines += _about_others([file for file in there if Path(file) not in own], folder)
        if kept:
            named = listed(file.as_posix() for file in kept)
            lines.append(f"{count(len(kept), 'caption file')} left as found in {self.folder}: {named}")
        return lines


def _about_others(files: Sequence[str], folder: Path) -> list[str]:
    whose = f"in {folder} made for other pictures, or nobody knows for which; left as found, and not copied"
    return [f"note: {count(len(files), 'caption')} {whose}: {listed(files)}"] if files else []


def _named(pictures: Sequence[TrainedPicture]) -> str:
    return listed(picture.name for picture in pictures)


TAGS = 200  # the commonest are told


def dataset_facts(report: Report) -> dict[str, Any]:
    """What other tools show of the pictures: how many, how often, in which sizes, under which tags. Folders
    get names in kohya's notation; the user's own stay his.
    """
    trigger = " ".join(report.settings.trigger.split())
    by_folder: dict[str, list[TrainedPicture]] = {}
    for picture in report.pictures:
        by_folder.setdefault(f"{picture.repeats}_{trigger}", []).append(picture)
    return {
        "folders": {
            name: {"n_repeats": pictures[0].repeats, "img_count": len(pictures)}
            for name, pictures in by_folder.items()
        },
        "tags": {name: _tags(pictures, trigger.lower()) for name, pictures in by_folder.items()},
        "buckets": {
            str(i): {"resolution": [bucket.width, bucket.height], "count": len(pictures)}
            for i, (bucket, pictures) in enumerate(report.buckets.items())
        },
        **({"masked": len(report.masked)} if report.masked else {}),
    }


def _tags(pictures: Sequence[TrainedPicture], trigger: str) -> dict[str, int]:
    """The commonest tags and the trigger, which sentences hide: web UIs cut those into words."""
    texts = [picture.caption.text for picture in pictures]
    called = sum(trigger in text.lower() for text in texts)
    counts = tag_frequencies(texts) | ({trigger: called} if called else {})
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:TAGS])
