"""Captions from the names of files and folders. Knows the words of Mega Man's world."""

import re
import unicodedata
from pathlib import Path

POSES = {
    "attack": "attacking",
    "charge": "charging",
    "climb": "climbing",
    "crouch": "crouching",
    "damage": "hurt",
    "dash": "dashing",
    "duck": "crouching",
    "fall": "falling",
    "fly": "flying",
    "idle": "standing",
    "jump": "jumping",
    "run": "running",
    "shoot": "shooting",
    "slide": "sliding",
    "stand": "standing",
    "teleport": "teleporting",
    "victory": "victory pose",
    "walk": "walking",
    "win": "victory pose",
}
VIEWS = {
    "back": "back view",
    "close up": "close-up",
    "closeup": "close-up",
    "front": "front view",
    "fullbody": "full body",
    "portrait": "portrait",
    "profile": "side view",
    "rear": "back view",
    "side": "side view",
}
FIGURES = {
    "axl": "Axl",
    "bass": "Bass",
    "dr wily": "Dr. Wily",
    "megaman": "mega man",
    "miniboss": "mini boss",
    "mm": "mega man",
    "proto": "Proto Man",
    "protoman": "Proto Man",
    "robot master": "robot master",
    "rockman": "mega man",
    "roll": "Roll",
    "rush": "Rush",
    "sigma": "Sigma",
    "wily": "Dr. Wily",
    "zero": "Zero",
    "ロックマン": "mega man",
    "洛克人": "mega man",
}
MEDIA = {
    "16bit": "16-bit",
    "2d": "2D",
    "3d": "3D",
    "8bit": "8-bit",
    "boxart": "box art",
    "concept": "concept art",
    "fanart": "fan art",
    "pixel": "pixel art",
    "pixelart": "pixel art",
    "screen shot": "",
}
VOCABULARY = POSES | VIEWS | FIGURES | MEDIA
TAGS = {tag.lower(): tag for tag in VOCABULARY.values() if tag} | VOCABULARY  # "running" is known as "run" is


NOUNS = frozenset({"boss", "enemy", "render", "robot", "sketch", "sprite"})  # end a tag: "blue robot, ..."


SERIES = {"exe": "EXE", "x": "X", "zx": "ZX"}  # stand behind the trigger: "mega man X"


DIRECTIONS = frozenset({"down", "left", "right", "up"})  # follow an action: "running left"


JOINTS = frozenset({"and", "of", "or"})  # tie words together; one that nothing precedes can't begin a tag


LINKS = JOINTS | {"a", "an", "at", "by", "for", "from", "in", "on", "over", "the", "to", "under", "with"}


CAMERA_WORDS = """
    cimg dcim dji dsc dscf dscn gopr img imgp mvimg pxl wa
    am app comfyui copy dall download edited fb gif hd hq image images jpeg jpg mp pasted photo photos picture
    pictures pm png received resized screenshot screenshots thumb thumbnail tumblr unnamed untitled webp
    上午 下午 副本 複本 拷贝 拷貝 图片 圖片 照片 微信图片 未命名 截图 截圖 屏幕截图 螢幕截圖 螢幕擷取畫面
    スクリーンショット bildschirmfoto kopie whatsapp
"""  # what cameras, systems and programs write into names, and no words of a picture


DROPPED = frozenset(CAMERA_WORDS.split())


BREAKS = ",;()[]{}+&"  # separate tags in names too


UUIDS = re.compile(
    r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|^screenshot_\d{8}-\d{6}.*", re.IGNORECASE
)  # and Android's screenshots, which end in an app's name
SIZES = re.compile(r"(?<!\S)(?:\d+x\d*|\d{3,} x \d{3,})(?!\S)", re.IGNORECASE)  # 1920x1080, 4x


BITS = re.compile(r"(?<!\S)(8|16) ?bits?(?!\S)", re.IGNORECASE)


IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
SEAMS = re.compile(
    r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"
    rf"|(?<=[{IDEOGRAPHS}])(?=[A-Za-z0-9])|(?<=[A-Za-z0-9])(?=[{IDEOGRAPHS}])"
)
HASHES = re.compile(r"(?=.*\d)(?![a-f]{4,}\d{1,4}$)[0-9a-f]{8,}", re.IGNORECASE)  # but not "facade01"


LETTER = r"[^\W\d_]"


def caption_from_name(picture: Path, folder: Path, trigger: str) -> str:
    """A caption from the file's and its folders' names, always the same: `megaman_x_02.jpg` -> "mega man X",
    `boss_robot_03.png` -> "mega man, boss, robot master".

    It begins with the trigger. Counters, dates, hashes and a camera's words are left out.
    """
    own_name = _pattern_in_names(trigger)
    head = trigger.split()
    tags: list[str] = []
    for part in (*picture.relative_to(folder).parts[:-1], picture.stem):
        said = {word for tag in tags for word in tag.lower().split()}
        words = _words(part, own_name)
        known = {word.lower() for word in head}
        head += dict.fromkeys(SERIES[word] for word in words if word in SERIES and word not in known)
        tags += _tags([word for word in words if word not in SERIES], said)
    if any(tag.split()[-1] == "boss" for tag in tags):  # a boss that is a robot is a Robot Master
        tags = [re.sub(r"\brobot\b(?! master)", "robot master", tag) for tag in tags]
    return ", ".join([" ".join(head), *_each_once(tags, " ".join(head))])


def _each_once(tags: list[str], head: str) -> list[str]:
    """The tags that neither the head nor a fuller tag says already ("running", "running left")."""
    tags = list({tag.lower(): tag for tag in tags}.values())
    padded = [f" {tag.lower()} " for tag in (head, *tags)]
    return [
        tag
        for at, tag in enumerate(tags, start=1)
        if not any(padded[at] in other for other in padded[:at] + padded[at + 1 :])
    ]


def _tags(words: list[str], said: set[str]) -> list[str]:
    """Known words as their tags; the words between them together, but for those that folders said."""
    tags: list[str] = []
    run: list[str] = []
    at = 0
    while at < len(words):
        pair = " ".join(words[at : at + 2])
        word = pair if pair in TAGS else words[at]
        at += word.count(" ") + 1
        if word in DIRECTIONS and not run and tags and tags[-1].endswith("ing"):
            tags[-1] += f" {word}"
            continue
        ends = word == "," or word in TAGS
        run += [] if ends else [word]
        if ends or word in NOUNS:
            tags += _joined(run, said)
            run = []
        if TAGS.get(word):
            tags.append(TAGS[word])
    return tags + _joined(run, said)


def _joined(run: list[str], said: set[str]) -> list[str]:
    """The run as one tag, or none; without the links that nothing follows or precedes."""
    words = [word for word in run if word in LINKS or word not in said]
    while words and words[-1] in LINKS:
        words.pop()
    while words and words[0] in JOINTS:
        words.pop(0)
    return [" ".join(words)] if words else []


def _words(part: str, own_name: re.Pattern[str] | None) -> list[str]:
    """The words of a name in lower case; "," stands where a tag ends, also in the trigger's place."""
    text = UUIDS.sub(",", unicodedata.normalize("NFKC", part))
    text = own_name.sub(",", text) if own_name else text
    text = "".join(_spaced(char) for char in text)
    text = SIZES.sub("", BITS.sub(r"\1bit", " ".join(text.split())))
    text = " ".join(_taken_apart(chunk) for chunk in text.split())
    text = own_name.sub(" , ", text) if own_name else text  # now also out of "MegaManRunning"
    words: list[str] = []
    for word in text.lower().split():
        words += [word] if word in TAGS or word == "," else re.split(r"\d+", word)
    words = [word.strip("'’") for word in words]
    return [word for word in words if word == "," or _is_word(word)]


def _spaced(char: str) -> str:
    if char in BREAKS:
        return " , "
    mark = unicodedata.category(char).startswith("M") and not "\ufe00" <= char <= "\ufe0f"  # emoji's own
    return char if char.isalnum() or mark or char in "'’" else " "


def _taken_apart(chunk: str) -> str:
    """The words that are glued together in a chunk of a name; nothing for a hash or another machine's id."""
    if chunk.lower() in TAGS or chunk.lower() in DROPPED:
        return chunk.lower()
    apart = SEAMS.sub(" ", chunk)
    pieces = re.split(r"[\d\s]+", apart)
    odd = [piece for piece in pieces if piece.isascii() and 0 < len(piece) < 3 and not _is_known(piece)]
    is_id = len(odd) >= 3 or (odd and re.search(rf"\d{LETTER}", chunk))
    return "" if is_id or HASHES.fullmatch(chunk) else apart


def _is_known(word: str) -> bool:
    return any(word.lower() in words for words in (TAGS, SERIES, LINKS, DIRECTIONS))


def _is_word(word: str) -> bool:
    """Whether it tells anything: a single letter is a counter or an article, but for X and ideographs."""
    if len(word) == 1 and word.isascii():
        return word in SERIES
    return word not in DROPPED and any(char.isalnum() for char in word)


def _pattern_in_names(trigger: str) -> re.Pattern[str] | None:
    """Finds the trigger in a name however its words are parted ("mega-man", "megaman", "megamanx"); None for
    one without letters.
    """
    letters = [char for char in unicodedata.normalize("NFKC", trigger) if char.isalnum()]
    if not letters:
        return None
    spelled = r"[\W_]*".join(re.escape(char) for char in letters)
    series = f"(?:{'|'.join(sorted(SERIES, reverse=True))})?"
    behind = rf"(?={series}(?!{beside(letters[-1])}))"
    return re.compile(rf"(?<!{beside(letters[0])}){spelled}{behind}", re.IGNORECASE)


def beside(char: str) -> str:
    """A pattern of what mustn't stand beside this end of a word; ideographs have no spaces between words."""
    if re.match(f"[{IDEOGRAPHS}]", char) or not char.isalnum():
        return "(?!)"
    return r"\d" if char.isdecimal() else rf"(?:(?![{IDEOGRAPHS}]){LETTER})"
