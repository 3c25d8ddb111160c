"""The flags by which captions are made from the pictures."""

from dataclasses import dataclass
from typing import ClassVar

from megaman.config.parser import flag, require

LEAST_SCORE = 0.05  # of a tag that is remembered; no threshold is lower


@dataclass(frozen=True)
class CaptionFlags:
    """Captions from the pictures."""

    title: ClassVar[str] = "captions from the pictures, with --dry_run"
    caption_with: str | None = flag(
        None,
        "tagger or captioner that writes a caption for each picture without one: hub id or folder",
        is_path=True,
        is_of_one_command=True,
    )
    caption_threshold: float = flag(
        0.35, "how sure a tagger must be of a tag", least=LEAST_SCORE, below=1, is_of_one_command=True
    )
    caption_without: str | None = flag(
        None, "tags that no made caption gets, comma-separated", is_of_one_command=True
    )
    prune_tags: bool = flag(
        False,
        "leave out tags on more than 90 %% of the pictures: the trigger learns what they name",
        is_of_one_command=True,
    )
    write_captions: bool = flag(
        False,
        "put OUTPUT/captions beside the pictures that have none; nothing is overwritten",
        is_of_one_command=True,
    )


def set_for_tags(flags: CaptionFlags) -> list[str]:
    """The names of the flags that choose among tags, where they are not at their defaults."""
    names = ("caption_threshold", "caption_without", "prune_tags")
    return [name for name in names if getattr(flags, name) != getattr(CaptionFlags(), name)]


def check_captions(flags: CaptionFlags, *, is_dry: bool) -> None:
    """UserError (exit 2) where a flag is given that means nothing here. is_dry: with --dry_run."""
    made = flags.caption_with is not None
    with_dry_run = f"--caption_with {flags.caption_with}: captions are made with --dry_run; add it"
    require(is_dry or not made, with_dry_run)
    require(is_dry or not flags.write_captions, "--write_captions: must be given with --dry_run")
    for name in set_for_tags(flags) if not made else ():
        require(False, f"--{name}: must be given with --caption_with, whose tags it chooses")
