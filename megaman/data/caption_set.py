"""Captions offered in a folder of .txt files, to be edited, and put beside the pictures that have none."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from megaman.common.console import Exit, UserError
from megaman.common.files import replacing, write_text

PICTURES = ".pictures.json"  # beside captions: whose they are


def caption_files(
    captions: Sequence[tuple[Path, str]], taken: Collection[Path] = ()
) -> list[tuple[Path, str]]:
    """The .txt of each picture, and the words.

    captions: paths below the data folder, and the words. a.png and a.jpg share a.txt, unless theirs differ:
    then the second one's is a.jpg.txt. taken: files that would speak for other pictures too.
    """
    texts: dict[Path, str] = {}
    files = []
    for picture, text in captions:
        file = picture.with_suffix(".txt")
        if file in taken or texts.get(file, text) != text:
            file = picture.with_name(f"{picture.name}.txt")
        texts[file] = text
        files.append((file, text))
    return files


def write_caption_set(
    folder: Path,
    captions: Sequence[tuple[Path, str]],
    ours: Mapping[Path, str] | None = None,
    taken: Collection[Path] = (),
) -> tuple[list[Path], ...]:
    """Writes a .txt a picture under `folder`, to be edited: the new files; those that were there, and stay.

    captions, taken: see `caption_files`. ours: words, by picture, that are ours: a file that holds just these
    is replaced.
    """
    named = caption_files(captions, taken)
    texts = {folder / file: text for file, text in named}
    earlier: dict[Path, set[str]] = {}
    for (picture, _), (file, _) in zip(captions, named, strict=True):
        earlier.setdefault(folder / file, set()).add((ours or {}).get(picture, ""))
    for file in texts:
        if not file.parent.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{file}: would lie outside {folder}. Name another --output_dir.", Exit.USAGE)
    new = [
        file
        for file in texts
        if not os.path.lexists(file) or _holds_one_of(file, earlier[file] - {texts[file]})
    ]
    for file in new:
        write_text(file, f"{texts[file]}\n")
    return new, [file for file in texts if file not in new]


def _holds_one_of(file: Path, texts: Collection[str]) -> bool:
    """Whether the file itself holds one of these texts in a line and nothing else."""
    if file.is_symlink() or not file.is_file():
        return False
    with file.open("rb") as stream:
        data = stream.read(max((len(text.encode()) + 3 for text in texts), default=0))
    return data.rstrip(b"\r\n") in {text.encode() for text in texts if text}


def pictures_behind(folder: Path) -> dict[str, list[str]]:
    """Which pictures, by content, the captions in a folder were made for, by file; unknown ones lack."""
    try:
        known = json.loads((folder / PICTURES).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def note_pictures(folder: Path, pictures: Mapping[str, list[str]]) -> None:
    """Keeps for which pictures, by content, captions in a folder were made, by file."""
    write_text(folder / PICTURES, json.dumps(pictures_behind(folder) | dict(pictures), indent=1) + "\n")


def copy_caption_set(source: Path, files: Sequence[Path], folder: Path) -> tuple[list[Path], list[Path]]:
    """Copies these files, relative to `source`, to `folder` where nothing of their name lies: the new files,
    relative; those that were there, and stay. UserError (exit 7) if one is no ordinary file.
    """
    wanted = list(dict.fromkeys(files))
    new = [file for file in wanted if not os.path.lexists(folder / file)]
    for file in new:
        if not (source / file).is_file():
            raise UserError(f"{source / file}: is no ordinary file. Remove it.", Exit.STATE)
        data = (source / file).read_bytes()
        with replacing(folder / file) as partial:
            partial.write_bytes(data)
    return new, [file for file in wanted if file not in new]
