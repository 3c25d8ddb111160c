"""What lies in a data folder: what counts as a picture, and which folders are never meant."""

import io
from pathlib import Path

import pytest
from PIL import Image

from megaman.common.output_folder import RECORD, RECORDED
from megaman.data.folder import find_pictures, look_into
from megaman.data.pictures import BadPicture, open_picture
from megaman.generation.gallery import render_gallery

FIVE = (5, 50, 250)


def picture(path: Path, kind: str = "PNG", colour: tuple[int, int, int] = FIVE) -> Path:
    """A plain picture of this format, whatever its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(data, kind)
    path.write_bytes(data.getvalue())
    return path


def names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in find_pictures(folder)]


def left_out(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): why for path, why in look_into(folder).left_out.items()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jpe", "JPEG"), ("a.jfif", "JPEG"), ("a.jpg_large", "JPEG"), ("a.jpg~orig", "JPEG"), ("a", "JPEG"),
        ("a.apng", "PNG"), ("a.ppm", "PPM"), ("a.pgm", "PPM"), ("a.tga", "TGA"), ("a.gif", "GIF"),
        ("a.tif", "TIFF"), ("a.TIFF", "TIFF"), ("a.avif", "AVIF"), ("a.jp2", "JPEG2000"), ("a.part", "WEBP"),
        ("a.bak", "BMP"), ("a.heic", "PNG"), ("a.jxl", "JPEG"), ("image.1", "PNG"), ("a.dib", "BMP"),
        ("a.j2k", "JPEG2000"), ("a.qoi", "QOI"), ("a.sgi", "SGI"), ("a.dds", "DDS"), ("a.pcx", "PCX"),
        ("b", "QOI"), ("c", "DDS"),
    ],
)  # fmt: skip
def test_whatever_pillow_opens_is_a_picture_by_its_content(tmp_path: Path, name: str, kind: str) -> None:
    path = picture(tmp_path / name, kind)
    assert find_pictures(tmp_path) == [path]
    found = open_picture(path).image
    assert all(abs(a - b) <= 4 for a, b in zip(found.getpixel((8, 8)), FIVE, strict=True))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.heic", b"\0\0\0\x18ftypheic" + bytes(30), "a HEIC, which is not read"),
        ("phone", b"\0\0\0\x18ftypheic" + bytes(30), "a HEIC, which is not read"),
        ("a.jxl", b"\xff\x0a" + bytes(30), "a JPEG XL, which is not read"),
        ("a.psd", b"8BPS" + bytes(30), "a Photoshop file, which is not read"),
        ("a.svg", b"<svg xmlns='x'/>", "a web page or SVG, which is not read"),
        ("a.cr2", b"\x01\x02\x03\x04" * 9, "not a picture; save it as PNG"),
        ("a.icns", b"icns" + bytes(30), "not a picture; save it as PNG"),
        ("a.tga", b"\x01\x02\x03\x04" * 9, "not a picture; save it as PNG"),
    ],
)
def test_a_picture_that_cannot_be_read_is_named_with_its_kind(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    (path,) = find_pictures(tmp_path)
    with pytest.raises(BadPicture, match=reason):
        open_picture(path)


@pytest.mark.parametrize("suffix", [".dng", ".NEF", ".cr2", ".arw"])
def test_a_cameras_raw_file_is_not_taken_for_the_preview_in_it(tmp_path: Path, suffix: str) -> None:
    path = picture(tmp_path / f"a{suffix}", "TIFF")
    with pytest.raises(BadPicture, match="a camera's raw file; develop it to PNG or JPEG"):
        open_picture(path)


def test_a_ppm_with_a_comment_is_known_without_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "gimp").write_bytes(b"P6\n# Created by GIMP\n1 1\n255\n" + bytes(FIVE))
    (path,) = find_pictures(tmp_path)
    assert open_picture(path).image.getpixel((0, 0)) == FIVE


def test_a_backup_of_a_picture_beside_it_is_left_out_by_name(tmp_path: Path) -> None:
    for name in ("a.png", "a.png~", "a.png.bak", "b.png.orig"):
        picture(tmp_path / name)
    assert names(tmp_path) == ["a.png", "b.png.orig"]  # b.png itself is not there
    assert look_into(tmp_path).left_out_lines == [
        "left out: a.png.bak (a backup of a.png)",
        "left out: a.png~ (a backup of a.png)",
    ]


def test_other_files_are_no_pictures(tmp_path: Path) -> None:
    for name, content in {
        "README.md": b"# Pictures", "Thumbs.db": b"\xd0\xcf\x11\xe0", "a.mp4": b"\0\0\0\x18ftypisom",
        "a.zip": b"PK\3\4", "notes": b"BM is what I call him", "a.safetensors": bytes(40), "empty": b"",
        "page.html": b"<html>", "P1.md": b"P1 is best",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    assert find_pictures(tmp_path) == []


def test_folders_that_are_never_meant_are_left_out_by_name(tmp_path: Path) -> None:
    for name in (
        *("@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__MACOSX"),
        *(".ipynb_checkpoints", ".trash", "sub/@eadir"),
    ):
        picture(tmp_path / name / "a.png")
    (tmp_path / ".git").mkdir()  # without a picture: nothing is lost, nothing to say
    picture(tmp_path / "sub" / "b.png")
    assert names(tmp_path) == ["sub/b.png"]
    told = left_out(tmp_path)
    assert told.keys() == {
        *("@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__MACOSX"),
        *(".ipynb_checkpoints", ".trash", "sub/@eadir"),
    }
    assert (told["@eaDir"], told[".trash"]) == ("a NAS's thumbnails", "hidden")
    assert "left out: $RECYCLE.BIN/ (Windows' bin)" in look_into(tmp_path).left_out_lines


def test_of_kohyas_project_folder_the_pictures_alone_are_the_character(tmp_path: Path) -> None:
    picture(tmp_path / "img" / "10_mega man" / "a.png")
    for name in ("reg/1_robot/r.png", "model/cover.png", "log/curve.png", "sample/s.png"):
        picture(tmp_path / name)
    listing = look_into(tmp_path)
    assert listing.pictures == [tmp_path / "img" / "10_mega man" / "a.png"]
    assert left_out(tmp_path).keys() == {"reg", "model", "log", "sample"}
    assert "not the character" in left_out(tmp_path)["reg"]
    assert listing.kohya_pictures == tmp_path / "img"
    assert look_into(tmp_path / "img").kohya_pictures is None


def test_a_link_or_a_closed_folder_of_kohyas_name_is_no_project(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere" / "10_mega man" / "a.png")
    picture(tmp_path / "data" / "x.png")
    (tmp_path / "data" / "img").symlink_to(tmp_path / "elsewhere")
    listing = look_into(tmp_path / "data")
    assert listing.kohya_pictures is None
    assert listing.pictures == [tmp_path / "data" / "img", tmp_path / "data" / "x.png"]
    picture(tmp_path / "other" / "IMG" / "5_hero" / "a.png")
    assert look_into(tmp_path / "other").kohya_pictures == tmp_path / "other" / "IMG"


@pytest.mark.parametrize("name", ["reg", "REG", "reg_img", "regularization", "class_images"])
@pytest.mark.parametrize("beside", ["image/10_x/a.png", "images/a.png", "10_mega man/a.png"])
def test_regularisation_pictures_are_left_out_under_the_names_people_give_them(
    tmp_path: Path, name: str, beside: str
) -> None:
    picture(tmp_path / beside)
    picture(tmp_path / name / "1_robot" / "r.png")
    assert names(tmp_path) == [beside]
    assert left_out(tmp_path) == {name: "regularisation pictures, which are not the character"}


def test_folders_of_such_names_elsewhere_are_the_users_own(tmp_path: Path) -> None:
    for name in ("model/a.png", "reg/b.png", "sample/c.png", "img2/d.png"):
        picture(tmp_path / name)
    assert names(tmp_path) == ["img2/d.png", "model/a.png", "reg/b.png", "sample/c.png"]
    assert look_into(tmp_path).kohya_pictures is None


def test_what_we_made_ourselves_is_not_trained_on(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "out" / "samples" / "step-000100" / "p.png")
    (tmp_path / "out" / RECORD).write_text("{" + ", ".join(f'"{name}": 1' for name in RECORDED) + "}")
    picture(tmp_path / "drawn" / "p.png")
    (tmp_path / "drawn" / ".lock").write_text("megaman 123")
    assert names(tmp_path) == ["a.png", "drawn/p.png"]  # another program's lock
    (tmp_path / "drawn" / "index.html").write_text(render_gallery([]), encoding="utf-8")
    assert names(tmp_path) == ["a.png"]
    assert left_out(tmp_path) == {
        "out": "a training run's output",
        "drawn": "drawn by generate_megaman.py",
    }
