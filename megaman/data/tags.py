"""Captions out of what a model sees in pictures: which tags count, how they are spelled, which are pruned."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

GENERAL, CHARACTER = 0, 4  # categories of a WD14-style tagger; it has ratings (9) too, which no caption needs
CHARACTER_THRESHOLD = 0.85  # of names, which a tagger is quick to see; kohya's value
PRUNED_ABOVE = 0.9  # the share of the pictures on which a tag describes the character itself
FEWEST_TO_PRUNE = 5  # pictures; of fewer, too much is on all of them by chance
LETTERS = re.compile(r"[^\W\d_]{2}")

Seen = tuple[str, int, float]  # a tag as the tagger spells it, its category, how sure it is of it (0-1)


@dataclass(frozen=True)
class MadeCaption:
    """A caption that was made from a picture, and its length in tokens."""

    text: str
    tokens: int


@dataclass(frozen=True)
class MadeCaptions:
    """What a model has made of the pictures that have no caption of their own."""

    model: str = ""
    by_picture: Mapping[str, MadeCaption] = field(default_factory=dict)  # the picture's name below the folder
    pruned: Mapping[str, int] = field(
        default_factory=dict
    )  # tags left out, and on how many pictures they are
    are_tags: bool = False


def spelled(tag: str) -> str:
    """A tagger's name of a tag as people write it, `blue_eyes` with a space; `^_^` stays as it is."""
    return tag.replace("_", " ").strip() if LETTERS.search(tag) else tag


def listed_tags(text: str | None) -> frozenset[str]:
    """The tags of a comma-separated list, in any case and with spaces or underscores, to be compared."""
    return frozenset(_alike(tag) for tag in (text or "").split(",")) - {""}


def _alike(tag: str) -> str:
    return " ".join(spelled(tag.strip()).lower().split())


def chosen_tags(seen: Sequence[Seen], threshold: float, without: Collection[str]) -> list[str]:
    """The tags of a picture: general ones that the tagger is sure enough of, the surest first, and behind
    them the characters. without: tags left out, as `_alike` spells them.

    A tag with a comma in it would be two tags of a caption, and is left out.
    """
    needed = {GENERAL: threshold, CHARACTER: max(threshold, CHARACTER_THRESHOLD)}
    sure = [each for each in seen if each[1] in needed and each[2] >= needed[each[1]] and "," not in each[0]]
    sure.sort(key=lambda each: (each[1], -each[2]))
    tags = dict.fromkeys(spelled(tag) for tag, _, _ in sure)
    return [tag for tag in tags if _alike(tag) not in without]


def tags_of_the_character(pictures: Sequence[Sequence[str]]) -> dict[str, int]:
    """The tags that are on more than 90 % of the pictures, and on how many, the most frequent first.

    A caption that names them spreads over many words what the trigger alone should learn. None of a few
    pictures.
    """
    if len(pictures) < FEWEST_TO_PRUNE:
        return {}
    counts = Counter(tag for tags in pictures for tag in set(tags))
    common = {tag: count for tag, count in counts.items() if count > PRUNED_ABOVE * len(pictures)}
    return dict(sorted(common.items(), key=lambda item: (-item[1], item[0])))


def caption_of_tags(trigger: str, tags: Sequence[str]) -> str:
    """The trigger and the tags behind it, comma-separated."""
    head = " ".join(trigger.split())
    return ", ".join([head, *(tag for tag in tags if _alike(tag) != _alike(head))])


def caption_of_sentence(trigger: str, sentence: str) -> str:
    """The trigger and a sentence behind it, in one line; just the sentence, if it begins with the trigger."""
    head = " ".join(trigger.split())
    words = " ".join(sentence.split())
    begins = re.match(rf"{re.escape(head)}(?!\w)", words, re.IGNORECASE)
    return words if begins else ", ".join(filter(None, (head, words)))
