"""Captions as people have them: sidecar files, and what names tell."""

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
from conftest import bound_by_modes

from megaman.common.console import UserError
from megaman.config.train import DataFlags
from megaman.data.caption_set import write_caption_set
from megaman.data.captions import (
    Caption,
    captions_of_nobody,
    mirrored,
    odd_repeats,
    read_captions,
    repeats_of,
    shared_captions,
    tag_frequencies,
    variants,
    with_trigger_replaced,
)
from megaman.data.folder import look_into
from megaman.data.name_captions import VOCABULARY, caption_from_name
from megaman.data.scan import Skipped

TRIGGER = "mega man"
HOME = Path("/pictures")
TEXTS = ("mega man, blue robot", "洛克人, 藍色", "[trigger], naïve\n", "", "a" * 300, "🤖, x\r\n")
PIECES = (
    "megaman",
    "X",
    "boss",
    "robot",
    "jump",
    "left",
    "洛克人",
    "IMG_",
    "02",
    "(1)",
    "é",
    "a1b2c3d4",
    " ",
)


def from_name(name: str, trigger: str = TRIGGER) -> str:
    return caption_from_name(HOME / name, HOME, trigger)


def complaint(folder: Path, *names: str) -> list[str]:
    """The lines of the error about the captions of these pictures, each without the folder's path."""
    with pytest.raises(UserError) as error:
        read_captions([folder / name for name in names], folder, DataFlags(trigger=TRIGGER))
    assert error.value.exit_code == 3
    return str(error.value).replace(f"{folder}{os.sep}", "").splitlines()


# ---------------------------------------------------------------- captions from names
@pytest.mark.parametrize(
    ("name", "caption"),
    [
        # the promises of SPEC and of the guide
        ("megaman_x_02.jpg", "mega man X"),
        ("boss_robot_03.png", "mega man, boss, robot master"),
        ("megaman_01.png", "mega man"),
        # the trigger, however it is spelled
        ("MegaMan01.png", "mega man"),
        ("MegaManX02.png", "mega man X"),
        ("megamanx4_intro.png", "mega man X, intro"),
        ("MEGAMAN_VICTORY.PNG", "mega man, victory pose"),
        ("rockman_x_03.png", "mega man X"),
        ("running_megaman.png", "mega man, running"),
        # poses, views, figures, media
        ("mega-man running left.png", "mega man, running left"),
        ("MegaManRunning.png", "mega man, running"),
        ("protoman_idle_front.png", "mega man, Proto Man, standing, front view"),
        ("proto man shoot.png", "mega man, Proto Man, shooting"),
        ("megaman_x_zero.png", "mega man X, Zero"),
        ("megaman_side_view.png", "mega man, side view"),
        ("megaman_close-up.png", "mega man, close-up"),
        ("megaman 8-bit sprite_03.png", "mega man, 8-bit, sprite"),
        ("megaman_8bit.png", "mega man, 8-bit"),
        ("megaman_concept_art.png", "mega man, concept art"),
        ("robot_arm.png", "mega man, robot, arm"),
        ("boss_blue_robot.png", "mega man, boss, blue robot master"),
        # words it doesn't know stay together
        ("zero_saber_03.png", "mega man, Zero, saber"),
        ("mega man holding a red sword in the rain.png", "mega man, holding red sword in the rain"),
        ("mega man jumping and shooting.png", "mega man, jumping, shooting"),
        ("Mega Man, running, blue background.png", "mega man, running, blue background"),
        ("mega man & bass.png", "mega man, Bass"),
        ("wily's castle.png", "mega man, wily's castle"),
        ("jump02left.png", "mega man, jumping left"),
        # other languages
        ("洛克人_01.png", "mega man"),
        ("洛克人X跳躍02.png", "mega man X, 跳躍"),
        ("cafe\u0301_03.png", "mega man, café"),  # as macOS writes é
        ("हिन्दी_03.png", "mega man, हिन्दी"),
        ("🤖️ megaman.png", "mega man"),
        # counters, hashes, dates, cameras
        ("a1b2c3d4e5.png", "mega man"),
        ("2023_pictures/tumblr_abc123def456_1280.png", "mega man"),
        ("45cfed92.png", "mega man"),
        ("d41d8cd98f00b204e9800998ecf8427e.png", "mega man"),
        ("550e8400-e29b-41d4-a716-446655440000.png", "mega man"),
        ("FzQ3kXaWcAE1abc.jpg", "mega man"),
        ("facade01.png", "mega man, facade"),
        ("IMG-20230101-WA0001.jpg", "mega man"),
        ("PXL_20230101_123456789.jpg", "mega man"),
        ("DSC00012.JPG", "mega man"),
        ("WhatsApp Image 2023-01-01 at 10.00.00 AM (1).jpeg", "mega man"),
        ("Screenshot_20230101-123456_Chrome.png", "mega man"),
        ("截圖 2024-01-01 上午10.00.00.png", "mega man"),
        ("Copy of megaman_jump - Copy (2).png", "mega man, jumping"),
        ("megaman_jump_1920x1080_v2.png", "mega man, jumping"),
        ("megaman_jump_4x.png", "mega man, jumping"),
        ("_.png", "mega man"),
        # folders
        ("10_megaman/IMG_0042.jpg", "mega man"),
        ("10_x/01.png", "mega man X"),
        ("boss/robot_03.png", "mega man, boss, robot master"),
        ("megaman_x/x_armor_03.png", "mega man X, armor"),
        ("running/run_01.png", "mega man, running"),
        ("running/run_left_01.png", "mega man, running left"),
        ("pixel/pixel art jump.png", "mega man, pixel art, jumping"),
        ("blue armor/blue armor_sword.png", "mega man, blue armor, sword"),
    ],
)
def test_a_caption_from_a_name_begins_with_the_trigger(name: str, caption: str) -> None:
    assert from_name(name) == caption


@pytest.mark.parametrize(
    ("trigger", "name", "caption"),
    [
        ("mgmn", "mgmn_jump.png", "mgmn, jumping"),
        ("mgmn", "megaman_02.png", "mgmn, mega man"),
        ("mgmn", "ロックマン_02.png", "mgmn, mega man"),
        ("mm01", "mm01_02.png", "mm01"),
        ("MEGA MAN", "megaman_x.png", "MEGA MAN X"),
        ("Mega Man X", "megaman_x_02.png", "Mega Man X"),
        ("Mega Man X", "megaman_02.png", "Mega Man X"),
        ("C++ (hero)", "c++ hero jump.png", "C++ (hero), jumping"),
        (".*", "megaman.png", ".*, mega man"),
        ("***", "jump.png", "***, jumping"),
        ("洛克人", "洛克人跳躍02.png", "洛克人, 跳躍"),
        ("ロックマン", "ロックマン_front.png", "ロックマン, front view"),
        ("roll", "scroll_rolling.png", "roll, scroll rolling"),
        (" mega  man ", "megaman_jump.png", "mega man, jumping"),
    ],
)
def test_any_trigger_stands_first_and_is_not_said_twice(trigger: str, name: str, caption: str) -> None:
    assert from_name(name, trigger) == caption


def test_every_word_of_the_vocabulary_gives_its_tag() -> None:
    for words, tag in VOCABULARY.items():
        said = TRIGGER if tag.lower() in ("", TRIGGER) else f"{TRIGGER}, {tag}"
        assert from_name(f"megaman_{words.replace(' ', '_')}_03.png") == said


def test_names_of_any_kind_give_one_caption_that_begins_with_the_trigger() -> None:
    rng = random.Random(0)
    for _ in range(500):
        odd = "".join(chr(rng.choice((rng.randrange(32, 0xD800), rng.randrange(32, 127)))) for _ in range(9))
        name = "".join(rng.choices((*PIECES, odd.replace("/", "")), k=5)).strip(". ") + "_.png"
        caption = from_name(f"10_{name}/{name}")
        assert caption == from_name(f"10_{name}/{name}")
        assert caption.startswith(TRIGGER), name
        tags = caption.split(", ")
        assert all(tag.split() and tag == " ".join(tag.split()) for tag in tags), name
        assert max(Counter(tag.lower() for tag in tags).values()) == 1, name


# ---------------------------------------------------------------- captions from files
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_are_read_in_the_three_encodings(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_text("[Trigger],  洛克人\n blue", encoding=encoding)
    (caption,) = read_captions([tmp_path / "a.png"], tmp_path, DataFlags(trigger=r"mg\1mn"))
    assert (caption.text, caption.source) == (r"mg\1mn, 洛克人, blue", "file")


def test_utf_16_is_read_from_either_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xfe\xff" + "洛克人".encode("utf-16-be"))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe" + "洛克人".encode("utf-16-le"))
    captions = read_captions([tmp_path / "a.png", tmp_path / "b.png"], tmp_path, DataFlags(trigger=TRIGGER))
    assert captions == [Caption("洛克人", "file")] * 2


def test_joined_files_leave_no_byte_order_mark_in_the_caption(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\xef\xbb\xbfmega man\n\xef\xbb\xbfblue")
    (caption,) = read_captions([tmp_path / "a.png"], tmp_path, DataFlags(trigger=TRIGGER))
    assert caption.text == "mega man, blue"


def test_all_unreadable_captions_are_named_in_one_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"mega man\x92s helmet")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfeabc")
    (tmp_path / "c.txt").write_bytes("mega man".encode("utf-16-le"))
    (tmp_path / "d.txt").write_text("洛克\x1b人")
    (tmp_path / "e.txt").write_bytes(b"\xff\xfe" + "ab\0".encode("utf-16-le"))
    (tmp_path / "f.txt").write_bytes(b"a" * 100_001)
    (tmp_path / "g.txt").write_bytes(b"a" * 100_000)
    lines = complaint(tmp_path, *[f"{letter}.png" for letter in "abcdefg"])
    assert lines == [
        "a.txt: not UTF-8 at byte 8 (0x92); save it as UTF-8",
        "b.txt: not UTF-16-LE at byte 4 (0x63); save it as UTF-8",
        "c.txt: holds NUL at byte 1, as UTF-16 without a mark does; save it as UTF-8 text",
        "d.txt: holds control character U+001B at byte 6; save it as UTF-8 text",
        "e.txt: holds NUL at byte 6, as UTF-16 without a mark does; save it as UTF-8 text",
        "f.txt: over 100 kB, which is no caption; shorten it or rename it",
    ]


def test_what_is_no_file_is_named_and_never_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    names = ["a.png"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "b.txt")
        (tmp_path / "c.txt").symlink_to("gone.txt")
        (tmp_path / "d.txt").symlink_to("d.txt")
        names += ["b.png", "c.png", "d.png"]
    lines = complaint(tmp_path, *names)
    expected = [
        "is a folder",
        "is no ordinary file",
        "a link to a file that is gone",
        "caption can't be read",
    ]
    for line, name, reason in zip(lines, names, expected, strict=False):
        assert line.startswith(f"{name[0]}.txt: {reason}")
    assert len(lines) == len(names)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="users and modes of POSIX")
def test_a_caption_without_the_right_to_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("mega man")
    (tmp_path / "a.txt").chmod(0)
    with bound_by_modes():
        assert complaint(tmp_path, "a.png")[0].startswith("a.txt: caption can't be read")


@pytest.mark.skipif(not Path("/proc/self/mem").is_file(), reason="Linux shows its memory as a file")
def test_a_caption_that_fails_while_it_is_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to("/proc/self/mem")
    assert complaint(tmp_path, "a.png")[0].startswith("a.txt: caption can't be read (")


@pytest.mark.parametrize(
    ("files", "picture", "text"),
    [
        (["a.txt", "a.caption"], "a.png", "a.txt"),
        (["a.caption"], "a.png", "a.caption"),
        (["a.TXT"], "a.PNG", "a.TXT"),
        (["a.Caption"], "a.png", "a.Caption"),
        (["a.txt", "a.png.txt"], "a.png", "a.png.txt"),
        (["a.txt", "a.png.txt"], "a.jpg", "a.txt"),
        (["a.png.caption", "a.txt"], "a.png", "a.txt"),
        (["Mega Man.TXT"], "mega man.png", "Mega Man.TXT"),
        (["cafe\u0301.txt"], "café.png", "cafe\u0301.txt"),
        (["ab.txt", "b.txt", "a.text"], "a.png", "mega man"),
        (["v1.txt"], "v1.2.png", "mega man"),
        (["v1.2.txt"], "v1.2.png", "v1.2.txt"),
    ],
)
def test_a_picture_finds_its_own_caption_file(
    tmp_path: Path, files: list[str], picture: str, text: str
) -> None:
    for file in files:
        (tmp_path / file).write_text(file)
    (caption,) = read_captions([tmp_path / picture], tmp_path, DataFlags(trigger=TRIGGER))
    assert (caption.text, caption.file) == (text, tmp_path / text if text in files else None)


def test_an_empty_caption_file_falls_back_to_the_next_and_then_to_the_name(tmp_path: Path) -> None:
    (tmp_path / "megaman_x.txt").write_bytes(b"\xef\xbb\xbf \r\n")
    (caption,) = read_captions([tmp_path / "megaman_x.png"], tmp_path, DataFlags(trigger=TRIGGER))
    assert (caption.text, caption.source, caption.file) == ("mega man X", "name", None)
    (tmp_path / "megaman_x.caption").write_text("blue")
    (caption,) = read_captions([tmp_path / "megaman_x.png"], tmp_path, DataFlags(trigger=TRIGGER))
    assert (caption.text, caption.source) == ("blue", "file")


def test_pictures_that_share_a_caption_file_are_named(tmp_path: Path) -> None:
    pictures = [tmp_path / name for name in ("a.jpg", "a.png", "a.webp", "b.png", "c.jpg", "c.png")]
    for name in ("a.txt", "a.webp.txt", "b.txt"):
        (tmp_path / name).write_text("blue")
    captions = read_captions(pictures, tmp_path, DataFlags(trigger=TRIGGER))
    assert shared_captions(pictures, captions) == {tmp_path / "a.txt": pictures[:2]}


def test_a_shared_caption_file_that_is_bad_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    assert len(complaint(tmp_path, "a.jpg", "a.png")) == 1


def test_bytes_of_any_kind_give_a_caption_or_one_line_that_names_the_file(tmp_path: Path) -> None:
    rng = random.Random(1)
    seen = set()
    for _ in range(200):
        data = bytearray(rng.choice(TEXTS).encode(rng.choice(("utf-8", "utf-8-sig", "utf-16", "utf-16-le"))))
        for _ in range(rng.randrange(3)):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        (tmp_path / "a.txt").write_bytes(data)
        try:
            (caption,) = read_captions([tmp_path / "a.png"], tmp_path, DataFlags(trigger=TRIGGER))
            assert caption.text == " ".join(caption.text.split()) != ""
            assert "\0" not in caption.text
            seen.add(caption.source)
        except UserError as error:
            assert str(error).startswith(f"{tmp_path / 'a.txt'}: ")
            assert len(str(error).splitlines()) == 1
            seen.add("error")
    assert seen == {"file", "name", "error"}


# ---------------------------------------------------------------- several lines
@pytest.mark.parametrize(
    ("text", "wordings"),
    [
        ("mega man\nblue robot\nrunning", ["mega man, blue robot, running"]),
        ("mega man, blue\nrunning, sand,\n\nsky", ["mega man, blue, running, sand, sky"]),
        ("He runs.\nHe is blue!", ["He runs.", "He is blue!"]),
        ("跑步。\n藍色。", ["跑步。", "藍色。"]),
        ("mega man runs fast\nmega man, blue, sand", ["mega man runs fast", "mega man, blue, sand"]),
        ("[trigger] runs\r\n[trigger] jumps\r\n", ["mega man runs", "mega man jumps"]),
        (
            "mega man is a blue robot who runs across\nthe sand under a red sky.",
            ["mega man is a blue robot who runs across the sand under a red sky."],
        ),
        (
            "a blue robot that runs across the sand\nand the sky",
            ["a blue robot that runs across the sand and the sky"],
        ),
        ("mega man\n", ["mega man"]),
        ("blue,robot,, helmet ,", ["blue,robot,, helmet ,"]),  # a line of his own stays as it is
        (
            "mega man, blue robot\nred boots, a very large and round helmet, sky\nnight",
            ["mega man, blue robot, red boots, a very large and round helmet, sky, night"],
        ),
    ],
)
def test_a_caption_of_several_lines_is_tags_or_a_caption_a_line_or_wrapped_text(
    tmp_path: Path, text: str, wordings: list[str]
) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (caption,) = read_captions([tmp_path / "a.png"], tmp_path, DataFlags(trigger=TRIGGER))
    assert list(caption.wordings) == wordings


# ---------------------------------------------------------------- metadata.jsonl
def listed(path: Path, *entries: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")


def test_metadata_jsonl_gives_captions_behind_a_pictures_own_file_and_before_its_name(tmp_path: Path) -> None:
    pictures = [tmp_path / name for name in ("a.png", "b.png", "c.png", "sub/d.png", "sub/e.png", "f.png")]
    listed(
        tmp_path / "metadata.jsonl",
        {"file_name": "a.png", "text": "[trigger] runs"},
        {"file_name": "b.png", "text": "never read"},
        {"file_name": "sub/d.png", "text": "from above"},
        {"file_name": "./sub/../sub/e.png", "text": "also from above"},
        {"file_name": "f.png", "text": "  "},
    )
    listed(tmp_path / "sub" / "metadata.jsonl", {"file_name": "d.png", "text": "nearer"})
    (tmp_path / "b.txt").write_text("its own")
    captions = read_captions(pictures, tmp_path, DataFlags(trigger=TRIGGER))
    assert [caption.text for caption in captions] == [
        *("mega man runs", "its own", "mega man", "nearer", "also from above", "mega man"),
    ]
    assert [caption.source for caption in captions] == ["file", "file", "name", "file", "file", "name"]


def test_a_damaged_metadata_jsonl_is_named_with_its_line_beside_all_else_that_is_wrong(
    tmp_path: Path,
) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "blue"}\n\n{"file_name": \n')
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError) as error:
        read_captions(
            [tmp_path / "a.png", tmp_path / "b.png"],
            tmp_path,
            DataFlags(),
            [Skipped(tmp_path / "c.png", "empty file")],
        )
    told = str(error.value).replace(f"{tmp_path}{os.sep}", "").splitlines()
    assert [line.split(":")[0] for line in told] == ["c.png", "metadata.jsonl", "b.txt"]
    assert told[1].startswith("metadata.jsonl: line 3 is no JSON")


@pytest.mark.parametrize("text", ["mega man \ud83d", "mega \0 man", "bell \a"])
def test_a_listed_caption_that_is_no_text_is_an_error(tmp_path: Path, text: str) -> None:
    listed(tmp_path / "metadata.jsonl", {"file_name": "a.png", "text": text})
    assert complaint(tmp_path, "a.png") == [
        "metadata.jsonl: line 1 holds a control character or half of one; save it as text"
    ]


def test_every_bad_line_of_a_list_is_named(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": 1\n{"file_name": "a.png", "text": "x"}\n{}}\n')
    assert [line.split(" is no JSON")[0] for line in complaint(tmp_path, "a.png")] == [
        *("metadata.jsonl: line 1", "metadata.jsonl: line 3"),
    ]


def test_a_list_may_name_pictures_as_windows_does_or_by_their_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "sub").mkdir(parents=True)
    pictures = [Path("data") / name for name in ("a.png", "sub/b.png")]
    listed(
        tmp_path / "data" / "metadata.jsonl",
        {"file_name": str(tmp_path / "data" / "a.png"), "text": "whole path"},
        {"file_name": "sub\\b.png", "text": "from Windows"},
    )
    captions = read_captions(pictures, Path("data"), DataFlags(trigger=TRIGGER))
    assert [caption.text for caption in captions] == ["whole path", "from Windows"]


def test_a_list_means_the_picture_of_the_very_name(tmp_path: Path) -> None:
    (tmp_path / "A.png").write_bytes(b"")
    if (tmp_path / "a.png").exists():
        pytest.skip("the disk knows no letter case")
    pictures = [tmp_path / name for name in ("A.png", "a.png", "B.PNG")]
    for picture in pictures:
        picture.write_bytes(b"")
    listed(
        tmp_path / "metadata.jsonl",
        {"file_name": "A.png", "text": "large"},
        {"file_name": "b.png", "text": "from Windows"},
        {"image": "c.png", "text": "without the key"},
    )
    captions = read_captions(pictures, tmp_path, DataFlags(trigger=TRIGGER))
    assert [caption.text for caption in captions] == ["large", "mega man", "from Windows"]
    assert captions_of_nobody(look_into(tmp_path), pictures, captions) == [
        "line 3 without a file_name in metadata.jsonl"
    ]


def test_captions_that_reach_nobody_are_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png", "sub/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name in (
        "a.txt",
        "b.txt.txt",
        "c.text",
        "hero.txt",
        "sub/E2.caption",
        "captions.json",
        "metadata.csv",
    ):
        (tmp_path / name).write_text("blue")
    (tmp_path / "a.caption").write_text("red")  # a.txt is read before it
    (tmp_path / "d.txt").write_text("")  # empty: says that there is none
    listed(
        tmp_path / "metadata.jsonl",
        {"file_name": "d.png", "text": "x"},
        {"file_name": "gone.png", "text": "y"},
        {"file_name": "b.png", "text": None},
        {"file_name": "d.png", "text": "z"},
    )
    listed(tmp_path / "sub" / "metadata.jsonl", {"file": "e.png", "prompt": "not a data set's"})
    (tmp_path / "broken.txt").write_text("for a picture that is skipped")
    (tmp_path / "broken.png").write_bytes(b"")
    listing = look_into(tmp_path)
    pictures = [path for path in listing.pictures if path.stem != "broken"]
    captions = read_captions(pictures, tmp_path, DataFlags(trigger=TRIGGER))
    assert captions_of_nobody(listing, pictures, captions) == [
        *("a.caption", "b.txt.txt", "c.text", "captions.json", "hero.txt", "metadata.csv"),
        *("gone.png in metadata.jsonl", "'b.png' without a text in metadata.jsonl"),
        *("'d.png' once more in metadata.jsonl", "sub/E2.caption", "sub/metadata.jsonl"),
    ]


# ---------------------------------------------------------------- kohya's folders
@pytest.mark.parametrize(
    ("picture", "repeats", "odd"),
    [
        ("a.png", 1, []),
        ("10_megaman/a.png", 10, []),
        ("10_megaman/sub/a.png", 10, []),
        ("10_megaman/5_boss/a.png", 5, []),
        ("010_mega man/a.png", 10, []),
        ("1000_a/a.png", 1000, []),
        ("1001_a/a.png", 1, ["1001_a"]),
        ("0_skip/a.png", 1, ["0_skip"]),
        ("10_megaman/2023_summer/a.png", 10, ["10_megaman/2023_summer"]),
        ("20230101_a/20240101_b/a.png", 1, ["20230101_a/20240101_b", "20230101_a"]),
        ("10 megaman/a.png", 1, []),
        ("10_/a.png", 10, []),
        ("-5_a/a.png", 1, []),
        ("megaman_10/a.png", 1, []),
        ("10_megaman.png", 1, []),
        ("¹⁰_a/a.png", 1, []),
    ],
)
def test_a_number_before_a_folders_name_is_its_repeats(picture: str, repeats: int, odd: list[str]) -> None:
    folder = Path("/20_data")  # in kohya, the folder that is named on the command line doesn't count
    assert repeats_of(folder / picture, folder) == repeats
    assert odd_repeats([folder / picture] * 2, folder) == odd


# ---------------------------------------------------------------- what is made of captions
def test_a_class_takes_the_triggers_place_and_stands_alone_where_there_is_none() -> None:
    captions = ["Mega Man, running", "a boss"]
    assert with_trigger_replaced(captions, TRIGGER, "robot") == ["robot, running", "robot"]
    assert with_trigger_replaced(captions, TRIGGER, "") == ["", ""]  # the empty caption, no ", running"


@pytest.mark.parametrize(
    ("trigger", "caption", "expected"),
    [
        ("C++ (hero)", "a c++ (HERO), blue", r"a \1 robot, blue"),
        (".*", "anything", r"\1 robot"),
        ("洛克人", "藍色洛克人跳躍", r"藍色\1 robot跳躍"),
        ("man", "mega woman and man", r"mega woman and \1 robot"),
        ("mega man", "mega\u00a0man's helmet", r"\1 robot's helmet"),
        ("ÉMILE", "émile, blue", r"\1 robot, blue"),
        (" mega man ", "mega man", r"\1 robot"),
        ("", "anything", r"\1 robot"),
    ],
)
def test_any_trigger_can_be_renamed(trigger: str, caption: str, expected: str) -> None:
    assert with_trigger_replaced([caption], trigger, r"\1 robot") == [expected]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("mega man, facing left, RIGHT arm up", "mega man, facing right, LEFT arm up"),
        ("Left-handed; the leftmost, rightwards", "Right-handed; the rightmost, leftwards"),
        ("hand_on_left_hip, (looking right:1.2)", "hand_on_right_hip, (looking left:1.2)"),
        ("bright copyright, cleft, lefty, righteous", "bright copyright, cleft, lefty, righteous"),
        ("righthanded, topleft, Bottom-Right, LOWERLEFT", "lefthanded, topright, Bottom-Left, LOWERRIGHT"),
        ("洛克人, 左手", "洛克人, 右手"),
        ("左右對稱, 左輪手槍, 座右銘", "左右對稱, 左輪手槍, 座右銘"),
        ("", ""),
    ],
)
def test_a_mirrored_pictures_caption_has_left_and_right_exchanged_and_twice_is_itself(
    caption: str, expected: str
) -> None:
    assert mirrored(caption, TRIGGER) == expected
    assert mirrored(expected, TRIGGER) == caption


@pytest.mark.parametrize("trigger", ["left 4 hero", "Left", "(right)", "\u5de6\u624b"])
def test_a_trigger_that_names_a_side_stays_when_its_picture_is_mirrored(trigger: str) -> None:
    assert mirrored(f"{trigger}, facing right", trigger) == f"{trigger}, facing left"


def test_a_side_in_the_trigger_stays_nowhere_else() -> None:
    assert mirrored("Left, leftmost, a left house", "the left") == "Right, rightmost, a right house"
    assert mirrored("leftmost house of Left", "Left") == "rightmost house of Left"


def test_variants_shuffle_the_tags_behind_those_that_are_kept() -> None:
    text = "mega man,  blue robot ,helmet,, detailed\n armor, jumping"
    shuffled = variants([text], 20, keep_tags=2, rng=random.Random(3))
    assert shuffled == variants([text], 20, keep_tags=2, rng=random.Random(3))
    assert len(shuffled) == 20
    assert len(set(shuffled)) > 1
    for variant in shuffled:
        assert variant.startswith("mega man, blue robot, ")
        assert sorted(variant.split(", ")) == sorted(
            ["mega man", "blue robot", "helmet", "detailed armor", "jumping"]
        )


def test_a_caption_without_commas_or_with_all_tags_kept_has_equal_variants() -> None:
    rng = random.Random(0)
    assert variants([" mega man  runs "], 2, keep_tags=0, rng=rng) == ["mega man runs"] * 2
    assert variants(["a, b, c"], 2, keep_tags=3, rng=rng) == ["a, b, c"] * 2
    assert variants([""], 1, keep_tags=1, rng=rng) == [""]
    assert variants(["a, b"], 0, keep_tags=0, rng=rng) == []


def test_tags_are_counted_with_the_most_frequent_first() -> None:
    counts = tag_frequencies(["mega man, Blue", "Mega  Man, blue, boss,", "mega man", ""])
    assert list(counts.items()) == [("mega man", 3), ("blue", 2), ("boss", 1)]


def test_a_written_caption_set_is_read_back_beside_the_pictures(tmp_path: Path) -> None:
    names = [
        "a.png",
        "10_x/a.jpg",
        "10_x/a.png",
        "10_x/sub/洛克人.webp",
        "b.1.png",
        "b.2.png",
        "c.bmp",
        "c.png",
    ]
    texts = ["one", "same", "same", "洛克人, 藍色", "three", "four", "this", "that"]
    pairs = [(Path(name), text) for name, text in zip(names, texts, strict=True)]
    files, kept = write_caption_set(tmp_path / "set", pairs)
    assert kept == []
    assert sorted(file.name for file in files) == sorted(
        ["a.txt", "a.txt", "洛克人.txt", "b.1.txt", "b.2.txt", "c.txt", "c.png.txt"]
    )
    assert (tmp_path / "set" / "10_x" / "a.txt").read_bytes() == b"same\n"
    captions = read_captions(
        [tmp_path / "set" / name for name in names], tmp_path / "set", DataFlags(trigger=TRIGGER)
    )
    assert [caption.text for caption in captions] == texts


def test_an_edited_caption_is_never_written_over(tmp_path: Path) -> None:
    pairs = [(Path("a.png"), "this"), (Path("a.jpg"), "that")]
    first, second = write_caption_set(tmp_path, pairs)[0]
    second.write_text("edited")
    first.unlink()
    assert write_caption_set(tmp_path, pairs) == ([first], [second])
    assert (first.read_text(), second.read_text()) == ("this\n", "edited")


@pytest.mark.parametrize("picture", ["../a.png", "sub/../../a.png", "/a.png", "link/a.png"])
def test_a_caption_set_never_leaves_its_folder(tmp_path: Path, picture: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(UserError, match="outside"):
        write_caption_set(tmp_path / "set", [(Path("good.png"), "blue"), (Path(picture), "blue")])
    assert not list(tmp_path.rglob("*.txt"))
