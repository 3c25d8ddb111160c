"""Captions as people have them: sidecar files, and what names tell."""

from pathlib import Path

import pytest

from megaman.captions import caption_from_name, read_captions, renamed
from megaman.errors import UserError


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("megaman_x_02.jpg", "mega man X"),
        ("megaman_01.png", "mega man"),
        ("MegaMan01.png", "mega man"),
        ("mega-man running left.png", "mega man running left"),
        ("boss_robot_03.png", "mega man boss robot"),
        ("10_megaman/IMG_0042.jpg", "mega man"),
        ("a1b2c3d4e5.png", "mega man"),
    ],
)
def test_a_caption_from_a_name_begins_with_the_trigger(name: str, caption: str) -> None:
    assert caption_from_name(Path("/pictures") / name, Path("/pictures"), "mega man") == caption


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_are_read_in_the_three_encodings(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_text("[trigger],  洛克人\n blue", encoding=encoding)
    (caption,) = read_captions([tmp_path / "a.png"], tmp_path, "mgmn")
    assert (caption.text, caption.source) == ("mgmn, 洛克人 blue", "file")


def test_all_unreadable_captions_are_named_in_one_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"mega man\x92s helmet")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfeabc")
    (tmp_path / "c.txt").write_bytes("mega man".encode("utf-16-le"))
    with pytest.raises(UserError) as error:
        read_captions([tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"], tmp_path, "mega man")
    assert "a.txt: not UTF-8 at byte 8 (0x92)" in str(error.value)
    assert "b.txt: not UTF-16-LE at byte 4" in str(error.value)
    assert "c.txt: holds NUL at byte 1" in str(error.value)
    assert error.value.exit_code == 3


def test_an_empty_caption_file_falls_back_to_the_name(tmp_path: Path) -> None:
    (tmp_path / "megaman_x.txt").write_text(" \n")
    (caption,) = read_captions([tmp_path / "megaman_x.png"], tmp_path, "mega man")
    assert (caption.text, caption.source) == ("mega man X", "name")


def test_a_class_takes_the_triggers_place_and_stands_alone_where_there_is_none() -> None:
    captions = ["Mega Man, running", "a boss"]
    assert renamed(captions, "mega man", "robot") == ["robot, running", "robot"]
