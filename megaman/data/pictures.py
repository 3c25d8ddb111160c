"""Telling picture files by their content and decoding them as the eye sees them. Knows PIL, EXIF, colour."""

import errno
import io
import os
import re
import stat
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageFile, UnidentifiedImageError

from megaman.common.console import Exit, UserError, one_line

SUFFIX_FORMATS = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".apng": "PNG",
    ".bmp": "BMP", ".dib": "BMP", ".webp": "WEBP", ".gif": "GIF", ".tif": "TIFF", ".tiff": "TIFF",
    ".avif": "AVIF", ".jp2": "JPEG2000", ".j2k": "JPEG2000", ".jpx": "JPEG2000", ".ppm": "PPM", ".pgm": "PPM",
    ".pbm": "PPM", ".pnm": "PPM", ".pam": "PPM", ".pfm": "PPM", ".tga": "TGA", ".pcx": "PCX", ".qoi": "QOI",
    ".sgi": "SGI", ".dds": "DDS",
}  # fmt: skip
RAW_SUFFIXES = {".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2", ".pef", ".srw"}  # of cameras
UNREAD_SUFFIXES = RAW_SUFFIXES | {
    ".heic", ".heif", ".jxl", ".psd", ".svg", ".xcf", ".kra", ".clip", ".ai", ".eps", ".exr", ".hdr", ".ico",
    ".icns", ".emf", ".wmf",
}  # opened to say why not  # fmt: skip
PICTURE_SUFFIXES = SUFFIX_FORMATS.keys() | UNREAD_SUFFIXES
BY_SUFFIX = {"TGA", "PCX"}  # these begin like anything: only their suffix tells them
PILLOW_FORMATS = tuple(sorted(set(SUFFIX_FORMATS.values()) - BY_SUFFIX))  # no other decoder ever runs
SHOWN: dict[str | None, str] = {
    "WEBP": "WebP",
    "JPEG2000": "JPEG 2000",
}  # formats under another name than Pillow's
MAX_PICTURE_PX = 64_000_000  # a larger one is a decompression bomb or a scan that needs shrinking first
MAX_FILE_BYTES = 1 << 29  # as many pixels of 16-bit RGBA, not compressed; some decoders read the whole file


@dataclass(frozen=True)
class Picture:
    """An RGB picture as the eye sees it, what had to be done for that, and how opaque it was: greyscale, None
    where it is so all over.
    """

    image: Image.Image
    remarks: tuple[str, ...] = ()
    alpha: Image.Image | None = None


class BadPicture(UserError):
    """A picture that can't be read (exit 3); reason: why, in a few words, in one line."""

    def __init__(self, path: Path, reason: str) -> None:
        self.reason = one_line(reason)
        super().__init__(f"{one_line(str(path))}: not a readable picture ({self.reason})", Exit.DATA)


class _Unfit(Exception):
    """Why a file or a part of it is of no use, in the user's words."""


# ---------------------------------------------------------------- files


def _check_file(path: Path) -> None:
    """Raises unless it is a file whose bytes can be read: a pipe or a device would never end."""
    info = path.stat()
    if stat.S_ISDIR(info.st_mode):
        os.scandir(path).close()  # raises where it may not be looked into
        linked = path.is_symlink()
        inner = "a folder with a picture's name; the pictures in it count by themselves"
        raise _Unfit("a link to a folder, which is not followed; copy its pictures" if linked else inner)
    if not stat.S_ISREG(info.st_mode):
        raise _Unfit("a pipe, a socket or a device")
    if info.st_size == 0:
        raise _Unfit("empty file")
    if info.st_size > MAX_FILE_BYTES:
        limit = f"the limit of {MAX_FILE_BYTES >> 20} MB; shrink it first"
        raise _Unfit(f"{info.st_size >> 20} MB are over {limit}")


BEGINNINGS = {
    b"\x89PNG": "a PNG",
    b"\xff\xd8\xff": "a JPEG",
    b"BM....\0\0\0\0": "a BMP",
    b"RIFF....WEBP": "a WebP",
    b"GIF8[79]a": "a GIF",
    b"II\\*\0|MM\0\\*": "a TIFF",
    b"\0\0\0\x0cjP  |\xff\x4f\xff\x51": "a JPEG 2000",
    b"P[1-6]\\s+[\\d#]|P7\n|P[Ff]\n": "a PPM",
    b"qoif": "a QOI",
    b"\x01\xda[\0\x01][\x01\x02]": "an SGI",
    b"DDS ": "a DDS",
    b"....ftypavi[fs]": "an AVIF",
    b"....ftyp(hei|hev|mif|msf)": "a HEIC",
    b"\xff\x0a|\0\0\0\x0cJXL ": "a JPEG XL",
    b"8BPS": "a Photoshop file",
    b"\0\0\1\0[\1-\x20]\0": "an icon",
}  # of pictures, whatever their name
OTHER_BEGINNINGS = {
    b"....ftyp": "a video",
    b"%PDF": "a PDF",
    b"\\s*<": "a web page or SVG",
}  # of what people rename to pictures
BEGINNING_BYTES = 16


def named(kind: str | None) -> str:
    """Pillow's name of a format as people say it: "a WebP"."""
    return f"{'an' if kind in ('AVIF', 'SGI') else 'a'} {SHOWN.get(kind, kind)}"


READ = frozenset(map(named, PILLOW_FORMATS))


def kind_of(beginning: bytes) -> str | None:
    """What a file that begins like this is, if it is a picture: "a PNG"."""
    found = (kind for start, kind in BEGINNINGS.items() if re.match(start, beginning, re.DOTALL))
    return next(found, None)


def is_picture(path: Path) -> bool:
    """Whether a file begins as pictures do, whatever its name says."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as stream:
            return kind_of(stream.read(BEGINNING_BYTES)) is not None
    except OSError:
        return False


def _unidentified(beginning: bytes) -> str:
    """Why no decoder wanted a file that begins like this."""
    if not beginning.strip(b"\0"):
        return "nothing but zeros where a picture begins"
    kind = kind_of(beginning)
    if kind in READ:
        return f"{kind} with a damaged beginning, or of a kind that is not supported"
    others = (name for start, name in OTHER_BEGINNINGS.items() if re.match(start, beginning, re.DOTALL))
    known = kind or next(others, None)
    return f"{known}, which is not read; save it again as PNG" if known else "not a picture; save it as PNG"


OS_REASONS = {
    errno.EACCES: "no permission to read it",
    errno.EPERM: "no permission to read it",
    errno.ELOOP: "a link that leads back to itself",
    errno.ENOENT: "no such file",
}


def _reason(error: Exception, path: Path) -> str:
    """The cause in a few words."""
    if isinstance(error, _Unfit):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        return f"over the limit of {MAX_PICTURE_PX // 1_000_000} megapixels; shrink it first"
    if isinstance(error, MemoryError):
        return "not enough memory to decode it; shrink it first"
    if isinstance(error, OSError) and error.errno is not None:  # the system's; a decoder's has no number
        if error.errno == errno.ENOENT and path.is_symlink():
            return "a link to a file that is not there"
        return OS_REASONS.get(error.errno) or str(error.strerror)
    words = " ".join(str(error).replace(str(path), "it").split())[:120]
    return f"damaged: {words or type(error).__name__}"


# ---------------------------------------------------------------- colours


def _tone_range(values: np.ndarray, mode: str) -> tuple[float, float, str]:
    """The values that mean black and white in a wide greyscale picture, and the remark."""
    if mode.startswith("I;16"):
        return 0, 65535, "16-bit, scaled to 8"
    finite = np.isfinite(values)
    low = float(values.min(initial=0, where=finite))
    top = float(values.max(initial=0, where=finite))
    usual = (1.0, 255.0, 65535.0) if mode == "F" else (255.0, 65535.0)
    slack = 0.1 if mode == "F" else 0  # resampled floats swing a little past black and white
    kind = "floating point" if mode == "F" else "32-bit"
    white = next((white for white in usual if top <= (1 + slack) * white), 0)
    if white > 0 and low >= -slack * white:
        return 0, white, f"{kind}, scaled to 8"
    return low, top, f"{kind}, its values from {low:.6g} to {top:.6g} scaled to 8"


def _narrowed(image: Image.Image) -> tuple[Image.Image, str]:
    """8 bits a channel: wide greyscale is scaled, where Pillow would clip it. NaN becomes black."""
    if not image.mode.startswith("I") and image.mode != "F":
        return image, ""
    values = np.asarray(image)
    black, white, remark = _tone_range(values, image.mode)
    flat = values.ravel()
    grey = np.empty(values.size, np.uint8)
    step = 255 / max(white - black, 1e-30)  # one tone alone is black
    for start in range(0, flat.size, 1 << 20):  # in parts: doubles of a whole scan would need half a GB
        part = flat[start : start + (1 << 20)].astype(np.float64)
        part = np.nan_to_num(part, nan=black, posinf=white, neginf=black)
        grey[start : start + part.size] = ((part - black) * step).round().clip(0, 255)
    narrow = Image.fromarray(grey.reshape(values.shape))
    if "transparency" in image.info:
        opaque = values != image.info["transparency"]
        narrow.putalpha(Image.fromarray(opaque.astype(np.uint8) * np.uint8(255)))
    return narrow, remark


def _without_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours as L, RGB (a copy) or CMYK, and the alpha channel, None where there is no transparency."""
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())  # La goes nowhere else, and alpha would be lost on the way
    plain = "L" if image.mode in ("1", "L", "LA") else "RGB"
    if image.has_transparency_data:
        if image.mode not in ("LA", "RGBA"):
            image = image.convert("LA" if plain == "L" else "RGBA")
        return image.convert(plain), image.getchannel("A")
    return image if image.mode == "CMYK" else image.convert(plain), None


@lru_cache(maxsize=8)  # one camera's profile is in all its pictures
def _way_to_srgb(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode that an ICC profile describes and its transform, None if its colours are sRGB's. Raises on a
    useless profile.
    """
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}[opened.profile.xcolor_space]
    transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(27, 27, 3)
    probe = Image.fromarray(cube).convert(mode)
    expected = np.asarray(probe.convert("RGB"), dtype=np.int16)
    found = np.asarray(ImageCms.applyTransform(probe, transform), dtype=np.int16)
    if found[-1, -1].min() < 200:
        raise _Unfit("white does not stay white")
    return mode, None if np.abs(found - expected).max() <= 2 else transform  # sRGB's own versions differ by 1


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _as_srgb(colours: Image.Image, info: dict) -> tuple[Image.Image, str]:
    """RGB in sRGB's colours, by the ICC profile if there is one that fits. colours: L, RGB or CMYK; RGB is
    changed in place, for a copy of a large scan takes 256 MB.
    """
    if "icc_profile" not in info:
        return _rgb(colours), "CMYK without a profile" if colours.mode == "CMYK" else ""
    try:
        mode, transform = _way_to_srgb(info["icc_profile"])
        if (colours.mode, mode) == ("L", "RGB"):
            colours = _rgb(colours)
        if colours.mode != mode:
            raise _Unfit("made for other pictures")
        if transform is None:
            return _rgb(colours), ""
        target = colours if mode == "RGB" else Image.new("RGB", colours.size)
        return transform.apply(colours, target), "colours converted from its ICC profile"
    except MemoryError:
        raise
    except Exception:  # a profile may be as damaged as anything, and the picture be well
        return _rgb(colours), "its ICC profile is damaged or does not fit, and is ignored"


def _on_white(rgb: Image.Image, alpha: Image.Image) -> str:
    """Paints white into the picture where it is transparent; the remark."""
    rgb.paste("white", mask=ImageChops.invert(alpha))
    is_seen = np.asarray(alpha).max() > 0
    return "transparency laid on white" if is_seen else "wholly transparent, nothing but white"


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF 2.3, tag Orientation
ORIENTATION, WHITE_IS, BITS_PER_SAMPLE = 0x0112, 262, 258  # tags of TIFF 6.0


def _upright(rgb: Image.Image, original: Image.Image) -> tuple[Image.Image, str]:
    try:
        turn = TURNS.get(original.getexif().get(ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # the block holds a camera's notes; the picture may be well
        return rgb, "its EXIF block is damaged, and is ignored"
    return (rgb, "") if turn is None else (rgb.transpose(turn), "turned by its EXIF mark")


def picture_of(image: Image.Image) -> Picture:
    """What the eye sees of a picture in any mode that Pillow knows: 8 bits, sRGB, on white, upright."""
    image.load()  # in a PNG, EXIF may follow the pixels
    narrow, depth = _narrowed(image)
    colours, alpha = _without_alpha(narrow)
    rgb, profile = _as_srgb(colours, image.info)
    if alpha is not None and np.asarray(alpha).min() == 255:
        alpha = None
    clear = "" if alpha is None else _on_white(rgb, alpha)
    del colours  # turning needs the room
    rgb, turned = _upright(rgb, image)
    rgb.info = {}  # whoever saves it must not mark it as turned, transparent or in other colours once more
    opaque = None if alpha is None else _upright(alpha, image)[0]
    return Picture(rgb, tuple(remark for remark in (depth, profile, clear, turned) if remark), opaque)


# ---------------------------------------------------------------- decoding


def _opened(stream: BinaryIO, suffix: str = "") -> ImageFile.ImageFile:
    stream.seek(0)
    beginning = stream.read(BEGINNING_BYTES)
    stream.seek(0)
    by_suffix = BY_SUFFIX & {SUFFIX_FORMATS.get(suffix, "")} if kind_of(beginning) is None else set()
    try:
        return Image.open(stream, formats=(*PILLOW_FORMATS, *by_suffix))
    except UnidentifiedImageError as error:
        raise _Unfit(_unidentified(beginning)) from error


def _checked_png(file: ImageFile.ImageFile, stream: BinaryIO) -> tuple[ImageFile.ImageFile, list[str]]:
    """The PNG ready to decode, after what Pillow omits: the pixels' checksums, and a transparent colour that
    is given in the samples of the file, which it widens or cuts to 8 bits.
    """
    file.verify()
    file = _opened(stream)
    samples = str(file.tile[0][3])
    key = file.info.get("transparency")
    if samples in ("L;2", "L;4") and key is not None:
        file.info["transparency"] = key * (85 if samples == "L;2" else 17)
    if samples == "RGB;16B" and key is not None:
        file.info["transparency"] = tuple(value >> 8 for value in key)
    cut = samples.endswith(";16B") and file.mode != "I;16"
    return file, ["16-bit, scaled to 8"] if cut else []


def _wide(file: ImageFile.ImageFile, kind: str | None) -> tuple[Image.Image, list[str]]:
    """A picture of more than 8 bits with what Pillow leaves to the reader: a TIFF whose 0 is white; a PPM,
    however dark, is scaled to 16 bits; a TIFF's colours are cut to 8.
    """
    if kind == "PPM" and file.mode == "I":
        return Image.fromarray(np.asarray(file).astype(np.uint16)), []
    if kind != "TIFF":
        return file, []
    tags = getattr(file, "tag_v2", {})
    if file.mode.startswith("I;16") and tags.get(WHITE_IS) == 0:
        return Image.fromarray(65535 - np.asarray(file).astype(np.uint16)), []
    cut = file.mode in ("RGB", "RGBA", "CMYK") and max(tags.get(BITS_PER_SAMPLE, (8,))) > 8
    return file, ["16-bit, scaled to 8"] if cut else []


def _decoded(stream: BinaryIO, suffix: str) -> Picture:
    """The picture in an open file. Raises anything."""
    file = _opened(stream, suffix.lower())
    width, height = file.size
    if width * height > MAX_PICTURE_PX:
        limit = f"the limit of {MAX_PICTURE_PX // 1_000_000} megapixels; shrink it first"
        raise _Unfit(f"{width} x {height} px is over {limit}")
    if width * height == 0:
        raise _Unfit(f"{width} x {height} px")
    kind = "JPEG" if file.format == "MPO" else file.format
    if kind == "TIFF" and suffix.lower() in RAW_SUFFIXES:  # the first picture in it is a small preview
        raise _Unfit("a camera's raw file; develop it to PNG or JPEG")
    remarks = []
    if SUFFIX_FORMATS.get(suffix.lower()) != kind:
        remarks.append(f"is {named(kind)}, whatever its name says")
    if (count := getattr(file, "n_frames", 1)) > 1:
        remarks.append(f"first of {count} {'pictures in it' if file.format == 'MPO' else 'frames'}")
    if kind == "PNG":
        file, more = _checked_png(file, stream)
        remarks += more
    image, more = _wide(file, kind)
    remarks += more
    if kind == "BMP" and file.mode == "RGBA" and file.getchannel("A").getextrema() == (0, 0):
        image = file.convert("RGB")  # many programs write a fourth channel and never fill it
        remarks.append("its alpha channel is empty, and is ignored")
    picture = picture_of(image)
    return replace(picture, remarks=(*remarks, *picture.remarks))


def open_picture(path: Path) -> Picture:
    """The picture in a file, by its content whatever its name says, with remarks on all that was not plain.

    Raises BadPicture when it can't be read.
    """
    try:
        _check_file(path)
        with warnings.catch_warnings(action="ignore"), path.open("rb") as stream:
            return _decoded(stream, path.suffix)
    except Exception as error:  # a decoder may raise anything; it is this one picture's problem
        raise BadPicture(path, _reason(error, path)) from error


def load_image(path: Path) -> Image.Image:
    """The picture in a file as the eye sees it, RGB. Raises BadPicture when it can't be read."""
    return open_picture(path).image


# ---------------------------------------------------------------- comparing
