"""Pictures as people have them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megaman.pictures import find_pictures, fit_center, load_image
from megaman_lora import MegaManDataset


def test_pictures_are_found_recursively_in_any_case_and_not_in_hidden_folders(tmp_path: Path) -> None:
    for name in ("a.PNG", "b.jpeg", "sub/c.webp", ".hidden/d.png", "._e.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert [path.name for path in find_pictures(tmp_path)] == ["a.PNG", "b.jpeg", "c.webp"]


def test_transparency_is_white_whatever_colour_hides_under_it(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 128)).save(tmp_path / "half.png")
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert load_image(tmp_path / "clear.png").getpixel((3, 3)) == (255, 255, 255)
    assert load_image(tmp_path / "palette.png").getpixel((3, 3)) == (255, 255, 255)
    assert all(abs(value - 127) <= 1 for value in load_image(tmp_path / "half.png").getpixel((3, 3)))


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


def test_damaged_pictures_are_reported_with_their_reason(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 90).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:900])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    dataset = MegaManDataset(tmp_path, None)
    assert [path.name for path in dataset.paths] == ["good.png"]
    assert len(dataset.skipped) == 4
    assert any("empty.png: not a readable picture (empty file)" in line for line in dataset.skipped)


def test_a_wrong_suffix_is_read_for_what_the_file_is(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "really.jpg", format="PNG")
    assert load_image(tmp_path / "really.jpg").getpixel((1, 1)) == (255, 0, 0)


def test_fit_center_covers_the_square_and_stays_in_range() -> None:
    image = Image.new("RGB", (30, 10), "black")
    image.paste("white", (10, 0, 20, 10))
    pixels = fit_center(image, 16)
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == torch.float32
    assert pixels[:, 8, 8].tolist() == [1, 1, 1]
    assert pixels.min() >= -1


def test_the_dataset_works_without_a_model(folder_of_pictures: Path) -> None:
    dataset = MegaManDataset(str(folder_of_pictures), None)
    assert len(dataset) == 6
    assert dataset[0].caption == "mega man, red background"
    assert dataset[5].caption == "mega man"
    assert dataset[0].pixels.shape == (3, 512, 512)
    assert dataset[0].ids is None


def test_the_dataset_tokenizes_when_it_has_a_tokenizer(folder_of_pictures: Path, tiny_base: object) -> None:
    dataset = MegaManDataset(folder_of_pictures, tiny_base.tokenizer, resolution=32)
    ids = dataset[0].ids
    assert ids.shape == (77,)
    assert tiny_base.tokenizer.decode(ids, skip_special_tokens=True).strip() == "mega man , red background"
