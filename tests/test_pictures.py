"""Pictures as people have them."""

import errno
import io
import os
import random
import struct
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw, ImageFile, ImageOps, JpegImagePlugin, PngImagePlugin

from megaman.common.console import Exit, UserError
from megaman.data.folder import find_pictures
from megaman.data.pictures import (
    MAX_FILE_BYTES,
    MAX_PICTURE_PX,
    Picture,
    load_image,
    open_picture,
    picture_of,
)
from megaman.data.scan import duplicates, fingerprint

Pixel = tuple[int, int, int]
NEEDS_POSIX = pytest.mark.skipif(os.name == "nt", reason="links, pipes and modes of POSIX")
CONVERTED = "colours converted from its ICC profile"
IGNORED = "its ICC profile is damaged or does not fit, and is ignored"
ON_WHITE = "transparency laid on white"
NARROWED = "16-bit, scaled to 8"
FLOATS = "floating point, scaled to 8"


# ---------------------------------------------------------------- files made by hand


def bytes_of(image: Image.Image, kind: str, **options: object) -> bytes:
    """The picture as a file of that kind."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def flat(mode: str, colour: object) -> Image.Image:
    """16 x 16 pixels of one colour."""
    return Image.new(mode, (16, 16), colour)


def chunk(name: bytes, data: bytes) -> bytes:
    """A part of a PNG. W3C PNG 3, section 5.3."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(
    size: tuple[int, int], depth: int, colour_type: int, rows: bytes, between: bytes = b"", after: bytes = b""
) -> bytes:
    """A PNG from its samples, each row led by the filter byte 0; chunks between header and pixels, and after
    them.
    """
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + between + pixels + after + chunk(b"IEND", b"")


def bmp_32(pixel: bytes) -> bytes:
    """2 x 2 pixels (blue, green, red, alpha) with an alpha mask. Microsoft's BITMAPV4HEADER."""
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, 2, 2, 1, 32, 3, 16, 0, 0, 0, 0) + masks + bytes(52)
    return b"BM" + struct.pack("<IHHI", 14 + 108 + 16, 0, 0, 14 + 108) + header + pixel * 4


def s15fixed16(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


SRGB_IN_D50 = {
    b"rXYZ": (0.4360747, 0.2225045, 0.0139322),
    b"gXYZ": (0.3850649, 0.7168786, 0.0971045),
    b"bXYZ": (0.1430804, 0.0606169, 0.7141733),
}  # Lindbloom's matrix for sRGB adapted to D50 by Bradford


def profile_of(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2.4. ICC.1:2001-04, section 6."""
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, 128 + 4 + 12 * len(tags) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    header = struct.pack(">I4sI4s4s4s12s4s", 0, b"test", 0x02400000, kind, space, connection, b"", b"acsp")
    header = header.ljust(68, b"\0") + s15fixed16(0.9642, 1.0, 0.8249)
    profile = header.ljust(128, b"\0") + table + data
    return struct.pack(">I", len(profile)) + profile[4:]


def linear_profile(order: tuple[bytes, bytes, bytes] = (b"rXYZ", b"gXYZ", b"bXYZ")) -> bytes:
    """RGB without gamma; the three primaries are those of sRGB in the order given."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, 0x0100)
    primaries = zip(SRGB_IN_D50, order, strict=True)
    tags = {name: b"XYZ " + bytes(4) + s15fixed16(*SRGB_IN_D50[source]) for name, source in primaries}
    white = b"XYZ " + bytes(4) + s15fixed16(0.9642, 1.0, 0.8249)
    return profile_of(
        b"RGB ", b"XYZ ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve) | {b"wtpt": white}
    )


def grey_profile() -> bytes:
    """Greyscale without gamma."""
    white = b"XYZ " + bytes(4) + s15fixed16(0.9642, 1.0, 0.8249)
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, 0x0100)
    return profile_of(b"GRAY", b"XYZ ", {b"kTRC": curve, b"wtpt": white})


def cmyk_profile() -> bytes:
    """A press whose black alone is a middle grey (L* = 50): only all four inks are black."""
    corners = bytearray()
    for inks in range(16):  # the last ink, black, varies fastest
        lightness = 100 if inks == 0 else 0 if inks == 15 else 50
        corners += bytes((round(lightness * 2.55), 128, 128))
    ramp = bytes(range(256))
    head = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + s15fixed16(1, 0, 0, 0, 1, 0, 0, 0, 1)
    white = b"XYZ " + bytes(4) + s15fixed16(0.9642, 1.0, 0.8249)
    table = head + ramp * 4 + bytes(corners) + ramp * 3
    return profile_of(b"CMYK", b"Lab ", {b"A2B0": table, b"wtpt": white})


SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def encoded(linear: float) -> int:
    """sRGB's transfer function, 0..1 to 0..255. IEC 61966-2-1."""
    value = 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055
    return round(255 * value)


# ---------------------------------------------------------------- finding


def test_pictures_are_found_recursively_in_any_case_and_not_in_hidden_folders(tmp_path: Path) -> None:
    for name in ("a.PNG", "b.jpeg", "sub/c.webp", ".hidden/d.png", "._e.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert [path.name for path in find_pictures(tmp_path)] == ["a.PNG", "b.jpeg", "c.webp"]


@NEEDS_POSIX
def test_a_link_to_a_picture_is_one_and_a_link_to_a_folder_is_not_followed(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (data / "sub", elsewhere):
        folder.mkdir(parents=True)
        flat("RGB", "red").save(folder / "a.png")
    (data / "linked.png").symlink_to(elsewhere / "a.png")
    (data / "out").symlink_to(elsewhere)
    (data / "sub" / "round").symlink_to(data)
    (data / "sub" / "itself").symlink_to("itself")
    unfollowed = [data / "out", data / "sub" / "round"]
    pictures = [data / "linked.png", data / "sub" / "a.png"]
    assert find_pictures(data) == sorted(pictures + unfollowed)
    for link in unfollowed:
        assert reason_of(link) == "a link to a folder, which is not followed; copy its pictures"
    assert load_image(data / "linked.png").getpixel((0, 0)) == (255, 0, 0)
    (tmp_path / "entry").symlink_to(data)
    assert len(find_pictures(tmp_path / "entry")) == 4


# ---------------------------------------------------------------- every kind of picture


def test_transparency_is_white_whatever_colour_hides_under_it(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 128)).save(tmp_path / "half.png")
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert load_image(tmp_path / "clear.png").getpixel((3, 3)) == (255, 255, 255)
    assert load_image(tmp_path / "palette.png").getpixel((3, 3)) == (255, 255, 255)
    assert all(abs(value - 127) <= 1 for value in load_image(tmp_path / "half.png").getpixel((3, 3)))


def test_a_16_bit_tiff_whose_zero_is_white_is_no_negative(tmp_path: Path) -> None:
    values = np.array([[0, 65535, 32768]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert [load_image(tmp_path / "a.tif").getpixel((x, 0))[0] for x in range(3)] == [255, 0, 127]


def test_a_dark_16_bit_pgm_stays_dark(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5\n2 1\n65535\n" + b"\x00\x00\x00\xc8")
    assert load_image(tmp_path / "a.pgm").getpixel((1, 0)) == (1, 1, 1)


def test_a_16_bit_ramp_keeps_its_levels(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    row = np.asarray(load_image(tmp_path / "ramp.png"))[0, :, 0]
    assert np.abs(row.astype(int) - np.arange(256)).max() <= 1


def test_a_turned_photograph_stands_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (20, 10), "black")
    picture.paste("white", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = load_image(tmp_path / "turned.png")
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_common_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (9, 7), "white").convert(mode).save(path)
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (9, 7))
    assert min(image.getpixel((4, 4))) >= 250


def palette_of(*colours: Pixel) -> Image.Image:
    """16 x 16 pixels of the palette's second colour."""
    image = flat("P", 1)
    image.putpalette([value for colour in colours for value in colour])
    return image


FIVE = (10, 100, 200)
FLOATING_FRAMES = {"save_all": True, "append_images": [flat("RGB", "red"), flat("RGB", "lime")]}
WEBP_FRAMES = FLOATING_FRAMES | {"lossless": True}
PARTS_OF_12 = {"save_all": True, "append_images": [flat("RGB", (20 * i, 0, 0)) for i in range(1, 12)]}
# name of the file: its bytes, the colour it must show, what must be said of it
KINDS: dict[str, tuple[bytes, Pixel, tuple[str, ...]]] = {
    "plain.png": (bytes_of(flat("RGB", FIVE), "PNG"), FIVE, ()),
    "plain.jpg": (bytes_of(flat("RGB", FIVE), "JPEG", quality=95), FIVE, ()),
    "progressive.JPEG": (bytes_of(flat("RGB", FIVE), "JPEG", quality=95, progressive=True), FIVE, ()),
    "plain.bmp": (bytes_of(flat("RGB", FIVE), "BMP"), FIVE, ()),
    "plain.webp": (bytes_of(flat("RGB", FIVE), "WEBP", lossless=True), FIVE, ()),
    "lossy.WebP": (bytes_of(flat("RGB", FIVE), "WEBP", quality=95), FIVE, ()),
    "grey.jpg": (bytes_of(flat("L", 100), "JPEG", quality=95), (100, 100, 100), ()),
    "grey.bmp": (bytes_of(flat("L", 100), "BMP"), (100, 100, 100), ()),
    "bits.bmp": (bytes_of(flat("1", 255), "BMP"), (255, 255, 255), ()),
    "bits.png": (bytes_of(flat("1", 255), "PNG"), (255, 255, 255), ()),
    "palette.bmp": (bytes_of(palette_of((0, 0, 0), FIVE), "BMP"), FIVE, ()),
    "palette.png": (bytes_of(palette_of((0, 0, 0), FIVE), "PNG"), FIVE, ()),
    "grey alpha.png": (bytes_of(flat("LA", (100, 51)), "PNG"), (224, 224, 224), (ON_WHITE,)),
    "alpha.png": (bytes_of(flat("RGBA", (*FIVE, 51)), "PNG"), (206, 224, 244), (ON_WHITE,)),
    "opaque.png": (bytes_of(flat("RGBA", (*FIVE, 255)), "PNG"), FIVE, ()),
    "alpha.webp": (
        bytes_of(flat("RGBA", (*FIVE, 51)), "WEBP", lossless=True), (206, 224, 244), (ON_WHITE,),
    ),
    "alpha.bmp": (bmp_32(b"\xc8\x64\x0a\x33"), (206, 224, 244), (ON_WHITE,)),
    "empty alpha.bmp": (
        bmp_32(b"\xc8\x64\x0a\0"), FIVE, ("its alpha channel is empty, and is ignored",),
    ),
    "clear.png": (
        bytes_of(flat("RGBA", (*FIVE, 0)), "PNG"),
        (255, 255, 255),
        ("wholly transparent, nothing but white",),
    ),
    "one clear entry.png": (
        bytes_of(palette_of((0, 0, 0), FIVE), "PNG", transparency=0), FIVE, (),
    ),
    "table of alphas.png": (
        bytes_of(palette_of((0, 0, 0), FIVE), "PNG", transparency=b"\xff\x33"), (206, 224, 244), (ON_WHITE,),
    ),
    "clear grey.png": (
        bytes_of(flat("L", 100), "PNG", transparency=100),
        (255, 255, 255),
        ("wholly transparent, nothing but white",),
    ),
    "no clear grey.png": (bytes_of(flat("L", 101), "PNG", transparency=100), (101, 101, 101), ()),
    "clear colour.png": (
        bytes_of(flat("RGB", FIVE), "PNG", transparency=FIVE),
        (255, 255, 255),
        ("wholly transparent, nothing but white",),
    ),
    "no clear colour.png": (bytes_of(flat("RGB", FIVE), "PNG", transparency=(10, 100, 201)), FIVE, ()),
    "clear grey of 2 bits.png": (
        png_of((4, 1), 2, 0, b"\0\x55", chunk(b"tRNS", b"\0\1")),
        (255, 255, 255),
        ("wholly transparent, nothing but white",),
    ),
    "clear grey of 4 bits.png": (
        png_of((2, 1), 4, 0, b"\0\x77", chunk(b"tRNS", b"\0\x07")),
        (255, 255, 255),
        ("wholly transparent, nothing but white",),
    ),
    "clear black of 1 bit.png": (
        png_of((8, 1), 1, 0, b"\0\x7f", chunk(b"tRNS", b"\0\0")), (255, 255, 255), (ON_WHITE,),
    ),
    "clear grey of 16 bits.png": (
        png_of((2, 1), 16, 0, b"\0\x12\x34\x12\x35", chunk(b"tRNS", b"\x12\x34")),
        (255, 255, 255),
        (NARROWED, ON_WHITE),
    ),
    "clear colour of 16 bits.png": (
        png_of((2, 1), 16, 2, b"\0" + bytes(range(1, 13)), chunk(b"tRNS", bytes(range(1, 7)))),
        (255, 255, 255),
        (NARROWED, ON_WHITE),
    ),
    "grey of 16 bits.png": (
        bytes_of(Image.fromarray(np.full((8, 8), 25700, np.uint16)), "PNG"), (100, 100, 100), (NARROWED,),
    ),
    "colours of 16 bits.png": (
        png_of((1, 1), 16, 2, b"\0\x0a\x0a\x64\x64\xc8\xc8"), FIVE, (NARROWED,),
    ),
    "grey alpha of 16 bits.png": (
        png_of((1, 1), 16, 4, b"\0\x64\x64\x33\x33"), (224, 224, 224), (NARROWED, ON_WHITE),
    ),
    "alpha of 16 bits.png": (
        png_of((1, 1), 16, 6, b"\0\x0a\x0a\x64\x64\xc8\xc8\x33\x33"), (206, 224, 244), (NARROWED, ON_WHITE),
    ),
    "inks.jpg": (
        bytes_of(flat("CMYK", (255, 0, 0, 0)), "JPEG", quality=100),
        (0, 255, 255),
        ("CMYK without a profile",),
    ),
    "moving.png": (bytes_of(flat("RGB", FIVE), "PNG", **PARTS_OF_12), FIVE, ("first of 12 frames",)),
    "moving, with a cover.png": (
        bytes_of(flat("RGB", FIVE), "PNG", default_image=True, **FLOATING_FRAMES),
        FIVE,
        ("first of 3 frames",),
    ),
    "moving.webp": (bytes_of(flat("RGB", FIVE), "WEBP", **WEBP_FRAMES), FIVE, ("first of 3 frames",)),
    "of a phone.jpg": (
        bytes_of(flat("RGB", FIVE), "MPO", quality=95, save_all=True, append_images=[flat("RGB", "red")]),
        FIVE,
        ("first of 2 pictures in it",),
    ),
    "really a png.jpg": (bytes_of(flat("RGB", FIVE), "PNG"), FIVE, ("is a PNG, whatever its name says",)),
    "really a jpeg.png": (
        bytes_of(flat("RGB", FIVE), "JPEG", quality=95), FIVE, ("is a JPEG, whatever its name says",),
    ),
    "really a webp.bmp": (
        bytes_of(flat("RGB", FIVE), "WEBP", lossless=True), FIVE, ("is a WebP, whatever its name says",),
    ),
    "really a bmp.webp": (bytes_of(flat("RGB", FIVE), "BMP"), FIVE, ("is a BMP, whatever its name says",)),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_picture_of_every_kind_shows_its_colour_and_what_was_done_is_said(
    name: str, tmp_path: Path
) -> None:
    content, colour, remarks = KINDS[name]
    path = tmp_path / name
    path.write_bytes(content)
    picture = open_picture(path)
    assert picture.image.mode == "RGB"
    assert picture.image.getpixel((0, 0)) == pytest.approx(colour, abs=2 if b"JFIF" in content[:20] else 1)
    assert picture.remarks == remarks
    assert load_image(path) == picture.image


def test_only_the_one_colour_that_a_png_names_is_clear(tmp_path: Path) -> None:
    greys = png_of((4, 1), 2, 0, b"\0\x1b", chunk(b"tRNS", b"\0\1"))  # 0, 1, 2, 3 of 3
    wide = png_of((2, 1), 16, 0, b"\0\x64\x64\x64\x65", chunk(b"tRNS", b"\x64\x64"))
    (tmp_path / "greys.png").write_bytes(greys)
    (tmp_path / "wide.png").write_bytes(wide)
    assert np.asarray(load_image(tmp_path / "greys.png"))[0, :, 0].tolist() == [0, 255, 170, 255]
    assert np.asarray(load_image(tmp_path / "wide.png"))[0, :, 0].tolist() == [255, 100]


def corners() -> np.ndarray:
    """48 x 32 px, each quarter in a colour of its own."""
    quarters = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)
    return quarters.repeat(16, 0).repeat(24, 1)


STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.transpose(1, 0, 2),
    6: lambda seen: np.rot90(seen),  # its first row is what is seen on the right
    7: lambda seen: seen[::-1, ::-1].transpose(1, 0, 2),
    8: lambda seen: np.rot90(seen, -1),
}  # how a camera stores what is seen, by the mark it sets. EXIF 2.3, tag 0x0112


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("mark", STORED)
def test_all_eight_exif_marks_are_obeyed_in_all_formats_that_have_them(
    tmp_path: Path, kind: str, mark: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = mark
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    path = tmp_path / f"a.{kind.lower()}"
    Image.fromarray(np.ascontiguousarray(STORED[mark](corners()))).save(path, kind, exif=exif, **options)
    picture = open_picture(path)
    assert picture.image.size == (48, 32)
    assert np.abs(np.asarray(picture.image).astype(int) - corners()).max() <= 3
    assert picture.remarks == (("turned by its EXIF mark",) if mark > 1 else ())


def test_a_damaged_exif_block_costs_the_mark_and_not_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    broken = chunk(b"eXIf", b"neither II nor MM")
    path.write_bytes(png_of((1, 1), 8, 0, b"\0\x64", broken))
    picture = open_picture(path)
    assert picture.image.getpixel((0, 0)) == (100, 100, 100)
    assert picture.remarks == ("its EXIF block is damaged, and is ignored",)


def test_an_exif_mark_that_follows_the_pixels_is_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    path = tmp_path / "a.png"
    mark = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    path.write_bytes(png_of((2, 1), 8, 0, b"\0\x64\xc8", after=mark))
    assert open_picture(path).image.getpixel((0, 0)) == (200, 200, 200)


def grey_array(values: list[float], kind: type) -> Image.Image:
    return Image.fromarray(np.array([values], kind))


BIG_ENDIAN = Image.frombytes("I;16B", (3, 1), struct.pack(">3H", 0, 25700, 65535))
INF = float("inf")
IN_MEMORY: dict[str, tuple[Image.Image, list[int], str]] = {
    "I;16": (grey_array([0, 25700, 65535], np.uint16), [0, 100, 255], NARROWED),
    "I;16B": (BIG_ENDIAN, [0, 100, 255], NARROWED),
    "I of 8 bits": (grey_array([0, 100, 255], np.int32), [0, 100, 255], "32-bit, scaled to 8"),
    "I of 16 bits": (grey_array([0, 25700, 65535], np.int32), [0, 100, 255], "32-bit, scaled to 8"),
    "I of 32 bits": (
        grey_array([0, 1_000_000, 2_550_000], np.int32),
        [0, 100, 255],
        "32-bit, its values from 0 to 2.55e+06 scaled to 8",
    ),
    "I below 0": (
        grey_array([-1000, 0, 1550], np.int32),
        [0, 100, 255],
        "32-bit, its values from -1000 to 1550 scaled to 8",
    ),
    "F to 1": (grey_array([0, 100 / 255, 1], np.float32), [0, 100, 255], FLOATS),
    "F past 1": (grey_array([-0.01, 100 / 255, 1.02], np.float32), [0, 100, 255], FLOATS),
    "F to 255": (grey_array([0, 100, 255], np.float32), [0, 100, 255], FLOATS),
    "F to 65535": (grey_array([0, 25700, 65535], np.float32), [0, 100, 255], FLOATS),
    "F from -1": (
        grey_array([-1, 200 / 255 - 1, 1], np.float32),
        [0, 100, 255],
        "floating point, its values from -1 to 1 scaled to 8",
    ),
    "F huge": (
        grey_array([-3e38, 0, 3e38], np.float32),
        [0, 128, 255],
        "floating point, its values from -3e+38 to 3e+38 scaled to 8",
    ),
    "F with holes": (
        grey_array([float("nan"), -INF, INF, 100, 255], np.float32),
        [0, 0, 255, 100, 255],
        FLOATS,
    ),
    "F of holes": (grey_array([float("nan"), -INF, INF], np.float32), [0, 0, 255], FLOATS),
    "F of nothing": (grey_array([0, 0], np.float32), [0, 0], FLOATS),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_MEMORY)
def test_wide_greyscale_is_scaled_and_nothing_but_overshoot_is_clipped(name: str) -> None:
    image, expected, remark = IN_MEMORY[name]
    with warnings.catch_warnings(action="error"):
        picture = picture_of(image)
    assert np.asarray(picture.image)[0, :, 0].tolist() == expected
    assert picture.remarks == (remark,)


@pytest.mark.parametrize(
    ("mode", "stored", "seen"),
    [
        ("LA", (100, 51), (224, 224, 224)),
        ("La", (20, 51), (224, 224, 224)),
        ("RGBA", (10, 100, 200, 51), (206, 224, 244)),
        ("RGBa", (2, 20, 40, 51), (206, 224, 244)),
        ("PA", (0, 51), (204, 204, 204)),
        ("RGBX", (10, 100, 200, 51), (10, 100, 200)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
        ("HSV", (85, 255, 255), (0, 255, 0)),
        ("YCbCr", (76, 85, 255), (254, 0, 0)),
        ("LAB", (138, 209, 198), (255, 0, 0)),  # CIE Lab of red in D50: 54.3, 80.8, 69.9
        ("1", 255, (255, 255, 255)),
        ("P", 0, (0, 0, 0)),
    ],
)
def test_every_mode_that_pillow_knows_shows_its_colour(mode: str, stored: object, seen: Pixel) -> None:
    image = picture_of(flat(mode, stored)).image
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == pytest.approx(seen, abs=5)


# ---------------------------------------------------------------- colour profiles


def saved_with(profile: bytes, image: Image.Image, path: Path) -> Picture:
    kind = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}[path.suffix]
    options = {"PNG": {}, "JPEG": {"quality": 100}, "WEBP": {"lossless": True}}[kind]
    path.write_bytes(bytes_of(image, kind, icc_profile=profile, **options))
    return open_picture(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_profile_turns_colours_into_those_of_srgb(tmp_path: Path, suffix: str) -> None:
    swapped = linear_profile((b"gXYZ", b"rXYZ", b"bXYZ"))
    picture = saved_with(swapped, flat("RGB", FIVE), tmp_path / f"a{suffix}")
    expected = [encoded(value / 255) for value in (100, 10, 200)]
    assert picture.image.getpixel((8, 8)) == pytest.approx(expected, abs=4 if suffix == ".jpg" else 1)
    assert picture.remarks == (CONVERTED,)


def test_profiles_of_greyscale_palettes_and_clear_pictures_are_obeyed(tmp_path: Path) -> None:
    grey = saved_with(grey_profile(), flat("L", 100), tmp_path / "grey.png")
    assert grey.image.getpixel((0, 0)) == pytest.approx([encoded(100 / 255)] * 3, abs=1)
    wide = Image.fromarray(np.full((8, 8), 25700, np.uint16))
    wide = saved_with(grey_profile(), wide, tmp_path / "wide.png")
    assert wide.image.getpixel((0, 0)) == grey.image.getpixel((0, 0))
    assert wide.remarks == (NARROWED, CONVERTED)
    expected = [encoded(value / 255) for value in FIVE]
    indexed = saved_with(linear_profile(), palette_of((0, 0, 0), FIVE), tmp_path / "indexed.png")
    assert indexed.image.getpixel((0, 0)) == pytest.approx(expected, abs=1)
    clear = flat("RGBA", (*FIVE, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 8, 16))
    clear = saved_with(linear_profile(), clear, tmp_path / "clear.png")
    assert clear.image.getpixel((0, 0)) == (255, 255, 255)
    assert clear.image.getpixel((12, 0)) == pytest.approx(expected, abs=1)
    assert clear.remarks == (CONVERTED, ON_WHITE)


def test_inks_look_as_their_profile_says_and_not_as_pure_colours(tmp_path: Path) -> None:
    black = saved_with(cmyk_profile(), flat("CMYK", (0, 0, 0, 255)), tmp_path / "black.jpg")
    paper = saved_with(cmyk_profile(), flat("CMYK", (0, 0, 0, 0)), tmp_path / "paper.jpg")
    grey = encoded(((50 + 16) / 116) ** 3)  # CIE 1976: luminance of L* = 50
    assert black.image.getpixel((8, 8)) == pytest.approx((grey, grey, grey), abs=2)
    assert paper.image.getpixel((8, 8)) == pytest.approx((255, 255, 255), abs=1)
    assert black.remarks == (CONVERTED,)


def test_srgb_profiles_change_nothing_and_go_unmentioned(tmp_path: Path) -> None:
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    picture = saved_with(SRGB_PROFILE, noise, tmp_path / "a.png")
    assert picture.image.tobytes() == noise.tobytes()
    assert picture.remarks == ()
    assert saved_with(SRGB_PROFILE, flat("L", 100), tmp_path / "grey.png").remarks == ()


@pytest.mark.parametrize(
    "profile",
    [b"no profile at all", SRGB_PROFILE[:200], linear_profile()[:300], grey_profile(), cmyk_profile(),
     linear_profile((b"rXYZ", b"rXYZ", b"rXYZ")).replace(s15fixed16(*SRGB_IN_D50[b"rXYZ"]), bytes(12))],
    ids=["noise", "cut", "cut in a tag", "for greyscale", "for inks", "everything black"],
)  # fmt: skip
def test_a_profile_that_is_damaged_or_does_not_fit_is_ignored_and_that_is_said(
    tmp_path: Path, profile: bytes
) -> None:
    picture = saved_with(profile, flat("RGB", FIVE), tmp_path / "a.png")
    assert picture.image.getpixel((0, 0)) == FIVE
    assert picture.remarks == (IGNORED,)


def test_a_loaded_picture_carries_no_marks_that_would_be_obeyed_twice(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.png"
    Image.fromarray(corners()).save(path, exif=exif, icc_profile=linear_profile(), transparency=(0, 0, 255))
    first = load_image(path)
    first.save(tmp_path / "again.png")
    again = open_picture(tmp_path / "again.png")
    assert again == Picture(first, ())


# ---------------------------------------------------------------- what can't be read


def reason_of(path: Path) -> str:
    """What opening says after the path, in one line."""
    with pytest.raises(UserError) as caught:
        open_picture(path)
    message = str(caught.value)
    assert caught.value.exit_code == Exit.DATA
    assert message.splitlines() == [message]
    assert message == f"{path}: not a readable picture ({caught.value.reason})"
    return caught.value.reason


def test_damaged_pictures_are_reported_with_their_reason(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 90).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:900])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    reasons = {p.name: reason_of(p) for p in find_pictures(tmp_path) if p.name != "good.png"}
    assert reasons["empty.png"] == "empty file"
    assert reasons["folder.png"].startswith("a folder with a picture's name")
    assert reasons["text.jpg"] == ("not a picture; save it as PNG")
    assert reasons["cut.png"].startswith("damaged: ")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (bytes(500), "nothing but zeros where a picture begins"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC, which is not read"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "an AVIF with a damaged beginning"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2", "a video, which is not read"),
        (b"<!DOCTYPE html><title>404", "a web page or SVG, which is not read"),
        (b"\x89PNG\r\n\x1a\n" + b"\xff" * 40, "a PNG with a damaged beginning"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "a JPEG with a damaged beginning"),
        (b"BM" + b"\xff" * 40, "damaged: "),
        (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(20), "damaged: "),
    ],
)
def test_files_that_are_something_else_are_named(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    assert reason_of(tmp_path / "a.jpg").startswith(reason)


SAMPLES: dict[str, bytes] = {
    kind: bytes_of(Image.fromarray(corners()).resize((40, 30), Image.Resampling.BICUBIC), kind, **options)
    for kind, options in {
        "png": {}, "jpeg": {}, "bmp": {}, "webp": {},
        "mpo": {"save_all": True, "append_images": [flat("L", 9)]},
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp", "webp"])
def test_a_picture_cut_anywhere_is_refused_and_never_filled_up(tmp_path: Path, kind: str) -> None:
    content, path = SAMPLES[kind], tmp_path / f"a.{kind}"
    whole = len(content) - 4 * (kind == "png")  # its last four bytes are the checksum of an empty mark
    for cut in [*range(1, whole, max(1, whole // 60)), whole - 1]:
        path.write_bytes(content[:cut])
        assert reason_of(path)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_png_whose_pixels_do_not_have_their_checksum_is_refused(tmp_path: Path) -> None:
    smooth = bytes_of(Image.linear_gradient("L"), "PNG")
    start, end = smooth.index(b"IDAT") + 4, smooth.index(b"IEND") - 8
    rng = random.Random(5)
    for _ in range(20):
        damaged = bytearray(smooth)
        damaged[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
        (tmp_path / "a.png").write_bytes(damaged)
        assert reason_of(tmp_path / "a.png").startswith("damaged: ")


HUGE = {
    "a.png": png_of((60_000, 60_000), 8, 2, b""),
    "b.png": png_of((MAX_PICTURE_PX // 8000 + 1, 8000), 8, 2, b""),
    "c.jpg": SAMPLES["jpeg"].replace(struct.pack(">HH", 30, 40), struct.pack(">HH", 65500, 65500)),
    "d.bmp": SAMPLES["bmp"].replace(struct.pack("<ii", 40, 30), struct.pack("<ii", 60_000, 60_000)),
    "e.webp": b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0" + b"\x2f" + struct.pack("<I", 0x0FFFFFFF) + bytes(9),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_bomb_is_refused_by_its_header_before_anything_is_decoded(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(HUGE[name])
    started = time.process_time()
    assert "over the limit of 64 megapixels; shrink it first" in reason_of(tmp_path / name)
    assert time.process_time() - started < 1


def test_a_file_too_large_for_any_picture_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.truncate(MAX_FILE_BYTES + 1)  # sparse: takes no room
    assert reason_of(tmp_path / "a.png") == "512 MB are over the limit of 512 MB; shrink it first"


def test_a_picture_without_pixels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_of((0, 5), 8, 2, b"\0" * 5))
    assert reason_of(tmp_path / "a.png")


@NEEDS_POSIX
def test_links_pipes_and_devices_are_told_apart_and_nothing_hangs(tmp_path: Path) -> None:
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    (tmp_path / "inside.png").symlink_to(tmp_path)
    assert {path.name: reason_of(path) for path in find_pictures(tmp_path)} == {
        "dangling.png": "a link to a file that is not there",
        "loop.png": "a link that leads back to itself",
        "pipe.png": "a pipe, a socket or a device",
        "endless.png": "a pipe, a socket or a device",
        "inside.png": "a link to a folder, which is not followed; copy its pictures",
    }
    assert reason_of(tmp_path / "never.png") == "no such file"


@contextmanager
def without_privileges() -> Iterator[Path]:
    """A folder that anybody may look into, seen as nobody where the tests run as root."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        as_root = os.geteuid() == 0
        try:
            if as_root:
                os.chown(name, 65534, -1)
                os.seteuid(65534)
            yield Path(name)
        finally:
            if as_root:
                os.seteuid(0)


@NEEDS_POSIX
def test_what_may_not_be_read_is_listed_and_says_so() -> None:
    with without_privileges() as folder:
        (folder / "closed").mkdir()
        for path in (folder / "mine.png", folder / "secret.png", folder / "closed" / "a.png"):
            flat("RGB", FIVE).save(path)
        (folder / "secret.png").chmod(0)
        (folder / "closed").chmod(0)
        assert find_pictures(folder) == [folder / "closed", folder / "mine.png", folder / "secret.png"]
        assert reason_of(folder / "secret.png") == "no permission to read it"
        assert reason_of(folder / "closed") == "no permission to read it"
        assert reason_of(folder / "closed" / "a.png") == "no permission to read it"
        assert load_image(folder / "mine.png").getpixel((0, 0)) == FIVE
        (folder / "closed").chmod(0o755)


@NEEDS_POSIX
def test_a_name_can_neither_break_the_line_nor_steer_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "ロック マン\n\x1b[2J\u202f.png"
    path.write_bytes(b"")
    with pytest.raises(UserError) as caught:
        open_picture(path)
    assert str(caught.value) == (
        f"{tmp_path}/ロック マン\\n\\x1b[2J\u202f.png: not a readable picture (empty file)"
    )


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RecursionError("maximum recursion depth exceeded"), "damaged: maximum recursion depth exceeded"),
        (MemoryError(), "not enough memory to decode it; shrink it first"),
        (struct.error("unpack requires a buffer of 4 bytes"), "damaged: unpack requires a buffer of 4 bytes"),
        (Image.DecompressionBombError("bomb"), "over the limit of 64 megapixels; shrink it first"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (AssertionError(), "damaged: AssertionError"),
        (ValueError("two\nlines and much more " * 20), "damaged: two lines and much more two"),
    ],
)
def test_whatever_a_decoder_raises_is_that_pictures_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load_prepare", fail)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "getexif", fail)
    (tmp_path / "a.jpg").write_bytes(SAMPLES["jpeg"])
    assert reason_of(tmp_path / "a.jpg").startswith(reason)
    assert len(reason_of(tmp_path / "a.jpg")) < 150
    (tmp_path / "a.png").write_bytes(SAMPLES["png"])
    if isinstance(error, MemoryError):  # says nothing about the file: nothing may be left out for it
        assert reason_of(tmp_path / "a.png") == reason
    else:
        assert open_picture(tmp_path / "a.png").remarks == ("its EXIF block is damaged, and is ignored",)


def test_the_keyboard_still_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load_read", interrupt)
    (tmp_path / "a.jpg").write_bytes(SAMPLES["jpeg"])
    with pytest.raises(KeyboardInterrupt):
        load_image(tmp_path / "a.jpg")


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The file with a few flipped bits, cut short, or with a piece of itself copied elsewhere."""
    damaged = bytearray(content)
    how = rng.randrange(3)
    if how == 0:
        for _ in range(rng.choice((1, 2, 8, 40))):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    elif how == 1:
        del damaged[rng.randrange(len(damaged)) :]
    else:
        source, target = rng.randrange(len(damaged)), rng.randrange(len(damaged))
        damaged[target : target + rng.randrange(40)] = damaged[source : source + rng.randrange(1, 60)]
    return bytes(damaged)


def test_damaged_bytes_give_a_picture_or_a_report_and_nothing_else(tmp_path: Path) -> None:
    seeds = [*SAMPLES.items(), *((Path(name).suffix[1:], content) for name, (content, *_) in KINDS.items())]
    for number in range(150):
        rng = random.Random(number)
        suffix, content = seeds[number % len(seeds)]
        path = tmp_path / f"{number}.{suffix.replace('mpo', 'jpg')}"
        path.write_bytes(mutated(content, rng))
        try:
            image = load_image(path)
        except UserError as error:
            assert str(error).startswith(f"{path}: not a readable picture (")
            assert len(str(error).splitlines()) == 1
        else:
            assert image.mode == "RGB"
            assert 0 < image.width * image.height <= MAX_PICTURE_PX


# ---------------------------------------------------------------- comparing


def drawn(seed: int) -> Image.Image:
    """A picture of coloured shapes, another one for every seed."""
    rng = random.Random(seed)

    def colour() -> Pixel:
        return rng.randrange(256), rng.randrange(256), rng.randrange(256)

    image = Image.new("RGB", (192, 160), colour())
    pen = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = rng.randrange(160), rng.randrange(120)
        pen.ellipse((x, y, x + rng.randrange(20, 90), y + rng.randrange(20, 90)), fill=colour())
    return image


def again(image: Image.Image, kind: str, **options: object) -> Image.Image:
    return Image.open(io.BytesIO(bytes_of(image, kind, **options)))


def test_scaled_and_compressed_copies_are_found_and_different_pictures_are_not() -> None:
    pictures = [drawn(seed) for seed in range(30)]
    copies = [
        again(pictures[0], "JPEG", quality=50),
        again(pictures[1], "WEBP", quality=50),
        pictures[2].resize((96, 80), Image.Resampling.LANCZOS),
        pictures[3].resize((384, 320), Image.Resampling.BICUBIC),
        again(pictures[4].resize((250, 208), Image.Resampling.BICUBIC), "JPEG", quality=70),
        pictures[5],
    ]
    assert repeats_among(pictures + copies) == [(first, 30 + first) for first in range(6)]


def repeats_among(pictures: list[Image.Image]) -> list[tuple[int, int]]:
    return duplicates([fingerprint(image) for image in pictures], [image.size for image in pictures])


def test_pictures_of_different_shapes_are_different_even_where_squeezing_makes_them_alike() -> None:
    picture = drawn(1)
    width, height = picture.size
    squeezed = picture.resize((width * 2, height), Image.Resampling.BICUBIC)
    assert fingerprint(squeezed) == fingerprint(picture)
    assert repeats_among([picture, squeezed]) == []
    for side in (17, 33, 100, 301):  # scaled copies are rounded to whole pixels
        scaled = (side, round(side * height / width))
        assert duplicates([fingerprint(picture)] * 2, [picture.size, scaled]) == [(0, 1)]


def test_each_repetition_is_listed_once_with_the_first_of_its_kind() -> None:
    a, b = drawn(1), drawn(2)
    assert repeats_among([a, b, a, a, b]) == [(0, 2), (0, 3), (1, 4)]
    assert repeats_among([]) == repeats_among([a]) == []


def test_flat_pictures_repeat_each_other_only_in_the_same_colour() -> None:
    colours = ["red", "darkred", "blue", "lime", "white", "black", "gray", (255, 0, 20), (255, 20, 0), "red"]
    pictures = [flat("RGB", colour) for colour in colours]
    assert repeats_among(pictures) == [(0, 9)]
    assert repeats_among([pictures[0], again(pictures[0], "JPEG")]) == [(0, 1)]


def test_a_mirrored_and_a_recoloured_picture_are_pictures_of_their_own() -> None:
    for seed in range(30):
        image = drawn(seed)
        mirrored = ImageOps.mirror(image)
        recoloured = Image.merge("RGB", [image.getchannel(name) for name in "GBR"])
        assert repeats_among([image, mirrored, recoloured]) == []


def test_a_thousand_pictures_are_compared_in_well_under_a_second() -> None:
    rng = random.Random(0)
    prints = [rng.getrandbits(500) for _ in range(999)]
    started = time.process_time()
    assert duplicates([*prints, prints[7]], [(64, 64)] * 1000) == [(7, 999)]
    assert time.process_time() - started < 1


# ---------------------------------------------------------------- pixels
