"""What prompts hold of the web UIs' syntax, which the models themselves don't know."""

import re
from collections.abc import Iterable

SHOWN = 40  # characters that a line repeats
LORA_TAG = re.compile(r"\s*<(?:lora|lyco|hypernet):[^<>]*>")  # names a file of theirs
WEIGHTS = re.compile(r"\([^()]*:\s*[\d.]+\s*\)|\[[^\[\]]+\]|\bBREAK\b|\bAND\b")
JOINED = re.compile(r"\bAND\b")

Piece = tuple[str, float]  # words, and how much they weigh
BREAK: Piece = ("BREAK", -1.0)  # the mark of a new chunk among the pieces: no words
HEAVIEST = 100.0  # a weight's limit, with either sign: the states of half precision overflow somewhere beyond
DEEPEST = 64  # brackets within brackets: HEAVIEST is reached before, and a row of them takes no time
FACTOR = {"(": 1.1, "[": 1 / 1.1}  # of a bracket without a number
_SYNTAX = re.compile(
    r"""\\[()\[\]]  # a bracket that is meant as one
    | \\\\(?=\\*[()\[\]])  # a backslash that is meant as one, where it would spare a bracket otherwise
    | :\s*(?P<weight>[+-]?(?:\d{1,9}(?:\.\d*)?|\.\d+))\s*\)
    | [()\[\]]
    | \bBREAK\b
    """,
    re.VERBOSE,
)


def without_lora_tags(text: str) -> str:
    """The prompt without <lora:…> and its like."""
    return LORA_TAG.sub("", text).strip() if LORA_TAG.search(text) else text


def notes_on_syntax(texts: Iterable[str], *, weights_are_read: bool = False) -> list[str]:
    """What should be said of the syntax in these prompts, a line each, once. weights_are_read: whether
    weights_of is asked for what they weigh.
    """
    tags, idle = [], []
    for text in texts:
        tags += LORA_TAG.findall(text)
        idle += (JOINED if weights_are_read else WEIGHTS).findall(LORA_TAG.sub("", text))
    notes = []
    if tags:
        tag = tags[0].strip()[:SHOWN]
        notes.append(f"note: {tag} is left out; --lora_path and --lora_scale say what is drawn with")
    if idle and weights_are_read:
        notes.append(f"note: {idle[0]!r} is a plain word here: prompts can't be joined by it")
    elif idle:
        like = f"{idle[0][:SHOWN]!r} and the like"
        notes.append(f"note: {like} are plain words here: weights, BREAK and AND do nothing")
    return notes


def weights_of(text: str) -> list[Piece]:
    """The prompt in pieces, and what each weighs by A1111's syntax: (x) 1.1, (x:1.3) what it says, [x] 1/1.1,
    one within another their product. A bracket that is never closed counts to the end; one that closes
    nothing, and a number that is none, are plain text; \\( and its like are brackets that are meant.

    BREAK comes as the piece of that name, inside brackets too (where A1111 reads it as a word). A backslash
    before anything but a bracket stays (A1111 drops it).
    """
    pieces: list[Piece] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # how many pieces stand before each open bracket
    end = 0
    for found in _SYNTAX.finditer(text):
        pieces.append((text[end : found.start()], 1.0))
        end = found.end()
        sign = found[0]
        closes = {")": "(", "]": "["}.get(sign[-1]) if sign[0] != "\\" else None
        if sign in opened and len(opened[sign]) < DEEPEST:
            opened[sign].append(len(pieces))
        elif closes is not None and opened[closes]:
            factor = FACTOR[closes] if found["weight"] is None else float(found["weight"])
            _multiply(pieces, opened[closes].pop(), factor)
        elif sign == BREAK[0]:
            pieces.append(BREAK)
        else:
            pieces.append((sign.removeprefix("\\"), 1.0))
    pieces.append((text[end:], 1.0))
    for bracket, starts in opened.items():
        for start in starts:
            _multiply(pieces, start, FACTOR[bracket])
    return _joined(pieces)


def has_weights(text: str) -> bool:
    """Whether there is anything in a prompt that weights_of reads otherwise than as it stands."""
    return weights_of(text) != [(text, 1.0)]


def _multiply(pieces: list[Piece], start: int, factor: float) -> None:
    """Changes the weights of all pieces from this one on."""
    for i in range(start, len(pieces)):
        words, weight = pieces[i]
        if pieces[i] != BREAK:
            pieces[i] = (words, max(-HEAVIEST, min(weight * factor, HEAVIEST)))


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces without empty ones, neighbours of one weight joined; of nothing, one that is empty."""
    joined: list[Piece] = []
    for words, weight in pieces:
        is_alike = bool(joined) and joined[-1][1] == weight and BREAK not in (joined[-1], (words, weight))
        if is_alike:
            joined[-1] = (joined[-1][0] + words, weight)
        elif words:
            joined.append((words, weight))
    return joined or [("", 1.0)]
