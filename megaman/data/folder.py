"""What lies in the data folder: pictures, texts beside them, and folders that are never meant."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megaman.common.console import Exit, UserError
from megaman.common.html import is_page
from megaman.common.output_folder import GALLERY_PAGE, holds_run, is_signed
from megaman.data import mask_names
from megaman.data.pictures import PICTURE_SUFFIXES, is_picture

CAPTION_SUFFIXES = (".txt", ".caption")
LIST = "metadata.jsonl"  # captions of many pictures: {"file_name": "a.png", "text": "mega man"}
TEXT_SUFFIXES = {*CAPTION_SUFFIXES, ".text", ".json", ".jsonl", ".csv", ".tags"}  # where people keep captions
NEVER_MEANT = {
    "@eadir": "a NAS's thumbnails",
    "#recycle": "a NAS's bin",
    "@recycle": "a NAS's bin",
    "#snapshot": "a NAS's snapshots",
    "@recently-snapshot": "a NAS's snapshots",
    "network trash folder": "a NAS's bin",
    "recycler": "Windows' bin",
    "found.000": "what Windows has found of damaged files",
    "$recycle.bin": "Windows' bin",
    "system volume information": "Windows' own",
    "lost+found": "a file system's own",
    "__macosx": "macOS's own",
}  # by their names in lower case
KOHYA_PICTURES = {"img", "image", "images"}
NOT_THE_CHARACTER = "regularisation pictures, which are not the character"
REGULARISATION = re.compile(
    r"regs?([_ ]?(img|images?|data))?|regulari[sz]ation([_ ]images?)?|class[_ ]images?"
)
BESIDE_KOHYA_PICTURES = {
    "model": "kohya's results",
    "log": "kohya's log",
    "logs": "kohya's log",
    "sample": "kohya's sample pictures",
    "samples": "kohya's sample pictures",
}  # only where its pictures lie beside them


@dataclass(frozen=True)
class Listing:
    """The files of a data folder. Sorted, so that every machine sees one order."""

    folder: Path
    pictures: list[Path] = field(default_factory=list)  # and what people take for pictures
    texts: list[Path] = field(default_factory=list)  # that may be captions
    masks: dict[Path, Path] = field(default_factory=dict)  # of pictures that have one beside them
    left_out: dict[Path, str] = field(default_factory=dict)  # what else is a picture, or holds some; and why

    @property
    def left_out_lines(self) -> list[str]:
        """What was left out and why, a line each."""
        return [f"left out: {self.shown(place)} ({why})" for place, why in sorted(self.left_out.items())]

    def shown(self, place: Path) -> str:
        """Its name below the data folder; a folder's ends in a slash."""
        return place.relative_to(self.folder).as_posix() + ("/" if place.is_dir() else "")

    @property
    def kohya_pictures(self) -> Path | None:
        """Where the pictures lie, if the folder is kohya's project folder: one level too high."""
        ways = (path.relative_to(self.folder).parts for path in self.pictures)
        inside = (way[0] for way in ways if len(way) > 2 and re.match(r"\d+_", way[1]))
        found = next((name for name in inside if name.lower() in KOHYA_PICTURES), None)
        return None if found is None else self.folder / found


def look_into(folder: Path) -> Listing:
    """Everything below the folder that has to do with pictures. UserError (exit 3) if there is no folder.

    A picture is told by its suffix, in any case, or by its first bytes. Hidden files are left out, and hidden
    folders. What people take for pictures and is none is listed too, so that opening it says why and nothing
    is lost in silence: formats that are not read, links to folders, which are not followed, and folders that
    may not be looked into.
    """
    if not folder.is_dir():
        here = "" if folder.is_absolute() else f" in {Path.cwd()}"
        raise UserError(f"{folder}: no such folder of pictures{here}. Check --data_dir.", Exit.DATA)
    found = Listing(folder)
    walk = os.walk(folder, onerror=lambda error: found.pictures.append(Path(error.filename)))
    for name, folders, files in walk:
        place = Path(name)
        out = {each: why for each in folders if (why := _why_not_meant(place / each, folders))}
        found.left_out.update(
            {place / each: why for each, why in out.items() if _holds_picture(place / each)}
        )
        folders[:] = [each for each in folders if each not in out]
        copies = {each: of for each in files if (of := _original_of(each)) in files}
        found.left_out.update({place / each: f"a backup of {of}" for each, of in copies.items()})
        files = [each for each in files if each not in copies]
        _add_pictures(found, place, folders, files)
        found.texts.extend(place / each for each in _visible(files) if _suffix(each) in TEXT_SUFFIXES)
    found.pictures.sort()
    found.texts.sort()
    return found


def find_pictures(folder: Path) -> list[Path]:
    """The pictures below the folder, and what people take for pictures: see `look_into`."""
    return look_into(folder).pictures


def _add_pictures(found: Listing, place: Path, folders: list[str], files: list[str]) -> None:
    """Adds the pictures of one folder, and their masks, which are no pictures themselves."""
    drawn = {name for name in _visible(files) if mask_names.is_mask(name)}
    pictures = [path.name for path in _pictures_among(place, folders, [n for n in files if n not in drawn])]
    unread = mask_names.unread(pictures)
    pictures = [name for name in pictures if name not in unread]
    mask_of, idle = mask_names.paired(pictures, drawn)
    found.pictures.extend(place / name for name in pictures)
    found.masks.update({place / name: place / mask for name, mask in mask_of.items()})
    found.left_out.update({place / name: why for name, why in (unread | idle).items()})


def _pictures_among(place: Path, folders: list[str], files: list[str]) -> Iterator[Path]:
    for name in folders:
        if _suffix(name) in PICTURE_SUFFIXES or (place / name).is_symlink():
            yield place / name
    for name in _visible(files):
        known = _suffix(name) in PICTURE_SUFFIXES
        if known or (_suffix(name) not in TEXT_SUFFIXES and is_picture(place / name)):
            yield place / name


def _why_not_meant(place: Path, siblings: Iterable[str]) -> str | None:
    """Why the pictures of a folder are not those of the character; None if they may be."""
    name = place.name.lower()
    if name in NEVER_MEANT:
        return NEVER_MEANT[name]
    if name.startswith("."):
        return "hidden"
    beside = {each.lower() for each in siblings}
    if name in BESIDE_KOHYA_PICTURES and beside & KOHYA_PICTURES:
        return BESIDE_KOHYA_PICTURES[name]
    numbered = any(re.match(r"\d+_", each) for each in beside)
    if REGULARISATION.fullmatch(name) and (numbered or beside & KOHYA_PICTURES):
        return NOT_THE_CHARACTER
    if holds_run(place):
        return "a training run's output"
    return "drawn by generate_megaman.py" if is_signed(place) and is_page(place / GALLERY_PAGE) else None


def _original_of(name: str) -> str | None:
    """The picture of which a file is a backup by its name, if it is one by that."""
    match = re.fullmatch(r"(.+?)(~|\.bak|\.orig|\.old)", name)
    return match[1] if match and _suffix(match[1]) in PICTURE_SUFFIXES else None


def _holds_picture(folder: Path) -> bool:
    names = (name for _, _, files in os.walk(folder) for name in _visible(files))
    return any(_suffix(name) in PICTURE_SUFFIXES for name in names)


def _visible(names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if not name.startswith("."))


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()
