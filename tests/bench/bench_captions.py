"""Do captions hold against what people's folders hold? Damaged files, odd names, and how long both take.

    python tests/bench/bench_captions.py [--files 2000] [--names 5000] [--seed 0]

Files: caption files in eight encodings, cut, flipped, joined and filled with control characters. Each must
give a caption without control characters, or one line that names the file. Names: folders and files of words,
counters, cameras' prefixes, hashes, dates and any unicode. Each must give the same caption twice, the trigger
first, no tag twice, and nothing of a hash, an id or a date. Prints a table, then one JSON line; a broken
promise is an AssertionError with the input.
"""

import argparse
import json
import platform
import random
import re
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megaman.common.console import Exit, UserError  # noqa: E402
from megaman.config.train import DataFlags  # noqa: E402
from megaman.data.captions import read_captions  # noqa: E402
from megaman.data.name_captions import VOCABULARY, caption_from_name  # noqa: E402

TEXTS = (
    "mega man, blue robot, helmet, game character, detailed armor",
    "[trigger] X, futuristic armor\nblue and white, action pose\r\n",
    "洛克人, 藍色機器人, 跳躍",
    "ロックマン、ジャンプ",
    "naïve café, “quotes” and — dashes",
    "🤖, 👨‍👩‍👧, e\u0301",
    "",
    " \t\n",
    "mega man, " * 3000,
)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "big5")
TRIGGERS = ("mega man", "mgmn", "洛克人", "C++ (hero)", "Mega Man X", ".*", "mm01")
CAMERAS = ("IMG_", "DSC0", "PXL_", "Screenshot ", "WhatsApp Image ", "Copy of ", "DCIM", "截圖 ")
WORDS = (
    "MegaMan",
    "megaman_x",
    "boss",
    "robot",
    "blue armor",
    "sword",
    "left",
    "洛克人",
    "élan",
    "the",
    "2nd",
)
CHARACTER_CLASSES = ((32, 127), (0xA0, 0x250), (0x900, 0x980), (0x4E00, 0x9FFF), (0x1F300, 0x1F700))


def damaged(rng: random.Random) -> bytes:
    """A caption file with nought to four injuries."""
    data = bytearray(rng.choice(TEXTS).encode(rng.choice(ENCODINGS), errors="ignore"))
    for _ in range(rng.randrange(5)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                del data[at:]
            case 1:
                data[at : at + 1] = rng.randbytes(1)
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(8))
            case 3:
                data[at:at] = rng.choice((b"\0", b"\x1a", b"\xef\xbb\xbf", b"\xff\xfe", b"\xc2\x92", b"\x7f"))
            case 4:
                data[at:at] = data[: rng.randrange(len(data) + 1)]
    return bytes(data)


def judge_file(folder: Path, data: bytes) -> str:
    """What became of it: "file", "name", or the kind of its error."""
    (folder / "a.txt").write_bytes(data)
    try:
        (caption,) = read_captions([folder / "a.png"], folder, DataFlags(trigger="mega man"))
    except UserError as error:
        line = str(error)
        assert line.startswith(f"{folder / 'a.txt'}: "), (data, line)
        assert line.isprintable(), (data, line)
        assert error.exit_code == Exit.DATA, data
        kinds = {" not UTF-": "not decodable", "NUL": "NUL", "control": "control character", "kB": "too long"}
        return next(kind for words, kind in kinds.items() if words in line)
    assert caption.text == " ".join(caption.text.split()) != "", data
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\ufeff]", caption.text), data
    assert "[trigger]" not in caption.text.lower(), data
    return caption.source


def random_name(rng: random.Random) -> str:
    """One to four parts of a name as people and machines write them."""
    low, high = rng.choice(CHARACTER_CLASSES)
    parts = (
        lambda: rng.choice(WORDS),
        lambda: rng.choice(list(VOCABULARY)),
        lambda: rng.choice(CAMERAS) + str(rng.randrange(10 ** rng.randrange(1, 9))),
        lambda: f"({rng.randrange(20)})",
        lambda: f"{rng.randrange(2000, 2030)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}",
        lambda: "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 9))),
    )
    name = rng.choice("_- .").join(rng.choice(parts)() for _ in range(rng.randrange(1, 5)))
    return name.replace("/", "").strip(". ") or "_"


def judge_name(rng: random.Random) -> int:
    """How many tags the caption of a random name has behind the trigger."""
    folders = [f"{rng.randrange(2000)}_{random_name(rng)}" for _ in range(rng.randrange(3))]
    picture, trigger = Path("data", *folders, f"{random_name(rng)}.png"), rng.choice(TRIGGERS)
    caption = caption_from_name(picture, Path("data"), trigger)
    assert caption == caption_from_name(picture, Path("data"), trigger), picture
    assert caption.startswith(trigger), (picture, caption)
    tags = caption.lower().split(", ")
    assert all(tag and tag == " ".join(tag.split()) for tag in tags), (picture, caption)
    assert max(Counter(tags).values()) == 1, (picture, caption)
    assert not re.search(r"\d{3}", caption), (picture, caption)
    return len(tags) - 1


def machine_name(rng: random.Random) -> str:
    """A name that only a machine can have given: a hash, a uuid, a camera's counter."""
    return rng.choice(
        (
            rng.randbytes(6).hex(),
            rng.randbytes(16).hex(),
            rng.randbytes(20).hex(),
            str(uuid.UUID(bytes=rng.randbytes(16))),
            f"IMG_{rng.randrange(10**4):04}",
            f"PXL_{rng.randrange(10**8):08}_{rng.randrange(10**9):09}",
            f"IMG-{rng.randrange(10**8):08}-WA{rng.randrange(10**4):04}",
        )
    )


def main() -> None:
    """Prints a table, then one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--names", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)

    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Counter(judge_file(Path(folder), damaged(rng)) for _ in range(args.files))
    file_ms = (time.process_time() - start) / max(args.files, 1) * 1000

    start = time.process_time()
    tag_counts = Counter(judge_name(rng) for _ in range(args.names))
    name_ms = (time.process_time() - start) / max(2 * args.names, 1) * 1000  # each is named twice

    machines = [machine_name(rng) for _ in range(args.names)]
    captions = [caption_from_name(Path(f"{name}.jpg"), Path(), "mega man") for name in machines]
    leaks = [(name, text) for name, text in zip(machines, captions, strict=True) if text != "mega man"]

    print(f"{args.files} damaged caption files, {file_ms:.2f} ms each (CPU)")
    for outcome, count in outcomes.most_common():
        print(f"  {outcome:<20}{count:>6}")
    print(f"{args.names} random names, {name_ms:.3f} ms each (CPU)")
    for tags, count in sorted(tag_counts.items()):
        print(f"  {tags:>2} tags{count:>20}")
    print(f"{args.names} names by machines, {len(leaks)} leave something in the caption {leaks[:3]}")
    found = {"files": dict(outcomes), "file_ms": round(file_ms, 3), "names": args.names}
    found |= {"name_ms": round(name_ms, 4), "machine_names": len(machines), "leaks": len(leaks)}
    print(json.dumps(found | {"seed": args.seed, "python": platform.python_version()}))


if __name__ == "__main__":
    main()
