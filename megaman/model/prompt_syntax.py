"""What prompts hold of the web UIs' syntax, which the models themselves don't know."""

import re
from collections.abc import Iterable

SHOWN = 40  # characters that a line repeats
LORA_TAG = re.compile(r"\s*<(?:lora|lyco|hypernet):[^<>]*>")  # names a file of theirs
WEIGHTS = re.compile(r"\([^()]*:\s*[\d.]+\s*\)|\[[^\[\]]+\]|\bBREAK\b|\bAND\b")


def without_lora_tags(text: str) -> str:
    """The prompt without <lora:…> and its like."""
    return LORA_TAG.sub("", text).strip() if LORA_TAG.search(text) else text


def notes_on_syntax(texts: Iterable[str]) -> list[str]:
    """What should be said of the syntax in these prompts, a line each, once."""
    tags, weights = [], []
    for text in texts:
        tags += LORA_TAG.findall(text)
        weights += WEIGHTS.findall(LORA_TAG.sub("", text))
    notes = []
    if tags:
        tag = tags[0].strip()[:SHOWN]
        notes.append(f"note: {tag} is left out; --lora_path and --lora_scale say what is drawn with")
    if weights:
        like = f"{weights[0][:SHOWN]!r} and the like"
        notes.append(f"note: {like} are plain words here: weights, BREAK and AND do nothing")
    return notes
