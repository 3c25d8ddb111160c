"""Which files of a folder are masks, and of which pictures: told by their names alone."""

from collections.abc import Collection, Iterable
from pathlib import Path

from megaman.common.files import folded

MASK_STEMS = (".mask", "-masklabel")  # behind a picture's name; the second is OneTrainer's
MASK_ENDINGS = tuple(f"{stem}.png" for stem in MASK_STEMS)


def is_mask(name: str) -> bool:
    """Whether a file is a mask by its name: hero.mask.png, hero-masklabel.png."""
    return name.lower().endswith(MASK_ENDINGS)


def paired(pictures: Iterable[str], masks: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The mask of each picture of a folder that has one, by their names in any letter case: a.png.mask.png
    before a.mask.png. And the masks that are nobody's, with the reason.
    """
    named: dict[str, list[str]] = {}
    for mask in sorted(masks):
        named.setdefault(folded(mask), []).append(mask)
    mask_of: dict[str, str] = {}
    wanted_by_any: set[str] = set()
    for picture in pictures:
        wanted = [stem + ending for stem in (picture, Path(picture).stem) for ending in MASK_ENDINGS]
        wanted_by_any.update(map(folded, wanted))
        name = next((name for name in wanted if folded(name) in named), None)
        if name is not None:
            mask_of[picture] = _nearest(named[folded(name)], name)
    other, none = "a mask; its picture has another one", "a mask, and no picture of its name beside it"
    idle = sorted(set(masks) - set(mask_of.values()))
    return mask_of, {mask: other if folded(mask) in wanted_by_any else none for mask in idle}


def _nearest(masks: list[str], wanted: str) -> str:
    """Of the same name in several letter cases, the one whose stem is written alike, else the first."""
    return next((mask for mask in masks if Path(mask).stem == Path(wanted).stem), masks[0])


def unread(pictures: Collection[str]) -> dict[str, str]:
    """Those of a folder's pictures that are meant as masks of others but are no PNG, and what to do."""
    known = {folded(name) for picture in pictures for name in (picture, Path(picture).stem)}
    found = {}
    for picture in pictures:
        stem = Path(picture).stem
        ending = next((each for each in MASK_STEMS if stem.lower().endswith(each)), None)
        if ending is not None and folded(stem.removesuffix(stem[-len(ending) :])) in known:
            found[picture] = f"a mask must be a PNG: save it as {stem}.png"
    return found
