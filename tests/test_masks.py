"""Masks: what is black in them is neither seen nor learned, and lies where the picture's pixels lie."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapted import inject_lora, weights_in
from PIL import Image
from torch import Tensor

from megaman.common.cache import Store, key_of
from megaman.common.console import UserError
from megaman.common.kinds import SD1, XL
from megaman.config.train import DataFlags, TrainConfig
from megaman.data.folder import look_into
from megaman.model.stable_diffusion import StableDiffusion, load_base
from megaman.training import objective
from megaman.training.encoding import Captions, EncodedDataset, encode
from megaman.training.objective import Batch, make_batch, training_losses, validation_batch
from megaman.training.sampler import Position
from megaman_lora import MegaManDataset, report_of

SIDE = 32
BOX = (
    8,
    4,
    20,
    24,
)  # left, top, right, bottom of what counts; no bound but the second is the picture's middle


def square(size: tuple[int, int] = (SIDE, SIDE), box: tuple[int, ...] = BOX) -> Image.Image:
    """A mask that is white in a box and black around it."""
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def noisy_picture(seed: int) -> Image.Image:
    """A square picture of noise."""
    levels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def on(background: Image.Image, seed: int = 1) -> Image.Image:
    """The same figure in the box, on that background."""
    picture = background.copy()
    picture.paste(noisy_picture(seed).crop(BOX), BOX)
    return picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for pictures."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def dataset_of(folder: Path, store: Store | None = None, **settings: Any) -> MegaManDataset:
    """Its pictures, to be trained on at 32 px."""
    return MegaManDataset(folder, None, DataFlags(resolution=SIDE, **settings), cell_px=8, store=store)


def encoded_of(
    folder: Path, base: StableDiffusion, store: Store | None = None, **settings: Any
) -> EncodedDataset:
    """Its pictures as training takes them, whose class is a robot."""
    dataset = dataset_of(folder, **settings)
    crops = [dataset.crops(i) for i in range(len(dataset))]
    texts = [dataset.texts(i) for i in range(len(dataset))]
    return encode(crops, Captions(texts, [["a robot"]] * len(dataset)), base, store or Store(None))


def batch_of(encoded: EncodedDataset, base: StableDiffusion, **settings: Any) -> Batch:
    """The first eight examples."""
    places = [Position(i, i % len(encoded)) for i in range(8)]
    return make_batch(places, encoded, TrainConfig(**settings), base.scheduler)


class Guess(torch.nn.Module):
    """Predicts its parameter, whatever it sees."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.guess = torch.nn.Parameter(torch.zeros(shape))

    def forward(self, *_: object, **__: object) -> tuple[Tensor]:
        return (self.guess,)


# ---------------------------------------------------------------- what is learned


def gradients(base: StableDiffusion, encoded: EncodedDataset) -> list[Tensor]:
    """Of an untrained LoRA, of eight examples; all of the step's parts have their share in them."""
    cfg = {"preserve_weight": 1.0, "caption_dropout": 0.0}
    learned = inject_lora(base.unet, TrainConfig(**cfg))
    torch.manual_seed(3)
    for each in learned:
        torch.nn.init.normal_(each, std=0.02)
    own, strayed = training_losses(base.unet, batch_of(encoded, base, **cfg), base.scheduler, 5.0)
    return [*torch.autograd.grad(own.sum() + strayed.sum(), learned)]


@pytest.mark.parametrize(("is_masked", "equal"), [(True, True), (False, False)])
def test_gradients_equal_those_of_another_background_under_the_same_mask(
    tmp_path: Path, tiny_folder: Path, is_masked: bool, equal: bool
) -> None:
    found = []
    for name, background in (("a", noisy_picture(7)), ("b", Image.new("RGB", (SIDE, SIDE), "green"))):
        (tmp_path / name).mkdir()
        on(background).save(tmp_path / name / "hero.png")
        if is_masked:
            square().save(tmp_path / name / "hero.mask.png")
        base = load_base(str(tiny_folder), device=torch.device("cpu"), dtype=torch.float32)
        found.append(gradients(base, encoded_of(tmp_path / name, base)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) == equal


def test_transparent_pictures_that_differ_in_hidden_colours_teach_the_same_under_alpha_mask(
    tmp_path: Path, tiny_base: StableDiffusion
) -> None:
    batches = []
    for name, seed in (("a", 7), ("b", 8)):
        (tmp_path / name).mkdir()
        picture = on(noisy_picture(seed))
        picture.putalpha(square())
        picture.save(tmp_path / name / "hero.png")
        batches.append(batch_of(encoded_of(tmp_path / name, tiny_base, alpha_mask=True), tiny_base))
    for one, other in zip(batches[0].tensors(), batches[1].tensors(), strict=True):
        assert torch.equal(one, other)
    assert encoded_of(tmp_path / "a", tiny_base).masks is None  # without the flag nothing is masked


def test_no_error_is_counted_where_the_mask_is_black_and_its_size_does_not_decide_the_loss(
    folder: Path, tiny_base: StableDiffusion
) -> None:
    on(noisy_picture(7)).save(folder / "a.png")
    square().save(folder / "a.mask.png")
    on(noisy_picture(8), 2).save(folder / "b.png")
    square(box=(0, 0, 4, 4)).save(folder / "b.mask.png")
    noisy_picture(3).save(folder / "c.png")  # without a mask
    encoded = encoded_of(folder, tiny_base)
    drawn = [validation_batch(encoded, index, [500]) for index in range(3)]
    for batch, box in zip(drawn, (BOX, (0, 0, 4, 4), (0, 0, SIDE, SIDE)), strict=True):
        model = Guess(batch.latents.shape)
        with torch.no_grad():
            model.guess.copy_(batch.noise + 1)  # off by one everywhere
        loss = objective.denoising_losses(model, batch, tiny_base.scheduler, 0)
        torch.testing.assert_close(loss, torch.ones(1))
        loss.sum().backward()
        lit = model.guess.grad.abs().sum((0, 1)) > 0
        left, top, right, bottom = (side // 2 for side in box)  # the tiny VAE's cells are 2 px
        expected = torch.zeros_like(lit)
        expected[top:bottom, left:right] = True
        assert torch.equal(lit, expected)


def test_grey_weighs_against_white(folder: Path, tiny_base: StableDiffusion) -> None:
    noisy_picture(1).save(folder / "a.png")
    mask = Image.new("L", (SIDE, SIDE), 255)
    mask.paste(51, (0, 0, 16, SIDE))
    mask.save(folder / "a.mask.png")
    (weights,) = encoded_of(folder, tiny_base).masks
    torch.testing.assert_close(weights[0, :, :8], torch.full((16, 8), 1 / 3))
    torch.testing.assert_close(weights[0, :, 8:], torch.full((16, 8), 5 / 3))


def test_a_white_mask_is_as_good_as_none_to_the_bit(tmp_path: Path, tiny_base: StableDiffusion) -> None:
    losses = []
    for name in ("plain", "masked"):
        (tmp_path / name).mkdir()
        noisy_picture(1).save(tmp_path / name / "a.png")
        if name == "masked":
            Image.new("L", (SIDE, SIDE), 255).save(tmp_path / name / "a.mask.png")
        batch = batch_of(encoded_of(tmp_path / name, tiny_base), tiny_base)
        assert (batch.masks is None) == (name == "plain")
        losses.append(training_losses(tiny_base.unet, batch, tiny_base.scheduler, 5.0)[0])
    assert torch.equal(*losses)


def test_a_crop_of_which_nothing_counts_teaches_nothing_and_divides_by_nothing(
    folder: Path, tiny_base: StableDiffusion
) -> None:
    noisy_picture(1).resize((96, SIDE)).save(folder / "a.png")
    square((96, SIDE), (0, 0, 20, SIDE)).save(folder / "a.mask.png")
    encoded = encoded_of(folder, tiny_base, crop="center")
    batch = batch_of(encoded, tiny_base)
    model = Guess(batch.latents.shape)
    loss = objective.denoising_losses(model, batch, tiny_base.scheduler, 5.0)
    loss.sum().backward()
    assert loss.tolist() == [0.0] * 8
    assert not model.guess.grad.any()


def test_the_class_is_preserved_under_black_masks_too(folder: Path, tiny_base: StableDiffusion) -> None:
    noisy_picture(1).save(folder / "a.png")
    square().save(folder / "a.mask.png")
    encoded = encoded_of(folder, tiny_base)
    inject_lora(tiny_base.unet, TrainConfig())
    for name, weight in tiny_base.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    batch = batch_of(encoded, tiny_base, preserve_weight=1.0)
    own, strayed = training_losses(tiny_base.unet, batch, tiny_base.scheduler, 0)
    plain, same = training_losses(tiny_base.unet, replace(batch, masks=None), tiny_base.scheduler, 0)
    assert torch.equal(strayed, same)
    assert len(strayed) == 2
    assert (own != plain).all()
    torch.testing.assert_close(own, objective.denoising_losses(tiny_base.unet, batch, tiny_base.scheduler, 0))


@pytest.mark.parametrize("kind", [SD1, XL], ids=lambda kind: kind.name)
@pytest.mark.parametrize("is_masked", [True, False])
def test_a_recorded_step_gets_all_of_a_batch(
    folder: Path, tiny_folders: Callable[..., Path], kind: Any, is_masked: bool
) -> None:
    noisy_picture(1).save(folder / "a.png")
    if is_masked:
        square().save(folder / "a.mask.png")
    base = load_base(str(tiny_folders(kind)), device=torch.device("cpu"), dtype=torch.bfloat16)
    batch = batch_of(encoded_of(folder, base), base, preserve_weight=1.0)
    again = Batch.of(batch.tensors())
    assert len(again.tensors()) == len(batch.tensors())
    assert all(one is other for one, other in zip(again.tensors(), batch.tensors(), strict=True))
    assert again.masks is batch.masks
    assert (again.masks is not None) == is_masked
    losses, _ = training_losses(base.unet, again, base.scheduler, 5.0)
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()


# ---------------------------------------------------------------- where it lies

WAYS = [
    {"crop": "center"}, {"crop": "center", "flip": True}, {"crop": "random"},
    {"crop": "random", "flip": True}, {"crop": "bucket", "flip": True},
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("size", [(80, 48), (48, 104), (24, 16), (64, 64)], ids=str)
def test_a_mask_lies_where_the_pictures_pixels_lie(folder: Path, way: dict, size: tuple[int, int]) -> None:
    box = (size[0] // 8, size[1] // 4, size[0] * 5 // 8, size[1] * 3 // 4)  # lopsided
    square(size, box).convert("RGB").save(folder / "a.png")  # the picture is as white as its mask
    square(size, box).save(folder / "a.mask.png")
    (crops,) = [dataset_of(folder, **way).crops(0)]
    assert len({crop.key for crop in crops}) == len(crops)
    assert any(crop.is_mirrored for crop in crops) == way.get("flip", False)
    for crop in crops:
        white = replace(crop, mask=None).pixels().mean(0).add(1).div(2)
        cells = (crop.bucket.height // 2, crop.bucket.width // 2)
        pooled = torch.nn.functional.adaptive_avg_pool2d(white[None], cells)
        found = crop.counting(cells)
        assert found.shape == (1, *cells)
        assert (found - pooled).abs().mean() < 0.05
        assert (found - pooled.flip(2)).abs().mean() > 0.05 or not pooled.std() > 0.1


@pytest.mark.parametrize("orientation", [3, 6, 7])
def test_a_mask_is_drawn_over_the_picture_as_it_is_seen(folder: Path, orientation: int) -> None:
    upright = square((48, 32), (4, 8, 20, 16)).convert("RGB")
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE}
    turned = upright.transpose(back[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned.save(folder / "a.png", exif=exif)
    square((48, 32), (4, 8, 20, 16)).save(folder / "a.mask.png")
    see_through = turned.copy()
    see_through.putalpha(turned.convert("L"))
    see_through.save(folder / "b.png", exif=exif)
    dataset = dataset_of(folder, alpha_mask=True)
    for index in (0, 1):
        levels = dataset.scanned[index].mask.source.levels()
        assert levels.size == (48, 32)
        assert levels.getbbox() == (4, 8, 20, 16)


def test_a_mask_of_the_pictures_shape_is_scaled_to_it(folder: Path) -> None:
    noisy_picture(1).resize((96, 64)).save(folder / "a.png")
    square((48, 32), (8, 8, 24, 16)).save(folder / "a.mask.png")
    noisy_picture(2).resize((100, 67)).save(folder / "b.png")
    square((13, 9), (2, 2, 6, 6)).save(folder / "b.mask.png")  # rounded to whole pixels
    masks = [picture.mask for picture in dataset_of(folder).scanned]
    assert masks[0].share == pytest.approx(16 * 8 / (48 * 32), abs=0.01)
    assert masks[0].source.levels().size == (96, 64)
    assert masks[1].source.levels().size == (100, 67)


def test_a_file_and_transparency_count_together(folder: Path) -> None:
    picture = noisy_picture(1)
    picture.putalpha(square(box=(0, 0, 16, SIDE)))
    picture.save(folder / "a.png")
    square(box=(0, 0, SIDE, 16)).save(folder / "a.mask.png")
    for flags, box in (({"alpha_mask": True}, (0, 0, 16, 16)), ({}, (0, 0, SIDE, 16))):
        assert dataset_of(folder, **flags).scanned[0].mask.box == box


def test_each_transparent_picture_has_its_own_mask_in_the_store(folder: Path, tmp_path: Path) -> None:
    boxes = [(0, 0, 16, SIDE), (0, 0, SIDE, 8)]
    for number, box in enumerate(boxes):
        picture = noisy_picture(1)
        picture.putalpha(square(box=box))
        picture.save(folder / f"{number}.png")
    for _ in range(2):  # made, and found
        scanned = dataset_of(folder, Store(tmp_path / "cache"), alpha_mask=True).scanned
        assert [picture.mask.box for picture in scanned] == boxes


def test_a_mask_is_black_where_it_is_transparent(folder: Path) -> None:
    noisy_picture(1).save(folder / "a.png")
    mask = Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 255))
    mask.putalpha(square())
    mask.save(folder / "a.mask.png")
    assert dataset_of(folder).scanned[0].mask.box == BOX


# ---------------------------------------------------------------- names and rubbish


def test_masks_are_found_by_their_names_and_are_no_pictures(folder: Path) -> None:
    (folder / "deep").mkdir()
    pictures = [
        "a.png",
        "b.jpg",
        "C.PNG",
        "d.webp",
        "deep/a.png",
        "e.f.png",
        "plain.png",
        "two.png",
        "two.jpg",
    ]
    masks = {
        "a.png": "a.mask.png", "b.jpg": "b.jpg.mask.png", "C.PNG": "c.Mask.PNG", "d.webp": "d-masklabel.png",
        "e.f.png": "e.f.mask.png", "two.png": "two.mask.png", "two.jpg": "two.mask.png",
    }  # fmt: skip
    for name in pictures:
        noisy_picture(len(name)).save(folder / name)
    for name in [
        *masks.values(),
        "orphan.mask.png",
        "a-masklabel.png",
        "deep/plain.mask.png",
        "plain.mask.jpg",
    ]:
        Image.new("L", (SIDE, SIDE), 255).save(folder / name)
    noisy_picture(1).save(folder / "the.mask.jpg")  # nobody's mask
    found = look_into(folder)
    shown = {found.shown(picture) for picture in found.pictures}
    assert shown == {*pictures, "the.mask.jpg"}
    assert {found.shown(a): found.shown(b) for a, b in found.masks.items()} == masks
    assert found.left_out_lines == [
        "left out: a-masklabel.png (a mask; its picture has another one)",
        "left out: deep/plain.mask.png (a mask, and no picture of its name beside it)",
        "left out: orphan.mask.png (a mask, and no picture of its name beside it)",
        "left out: plain.mask.jpg (a mask must be a PNG: save it as plain.mask.png)",
    ]


def bytes_of_png(image: Image.Image, path: Path) -> bytes:
    image.save(path)
    return path.read_bytes()


RUBBISH = {
    "empty": (b"", "its mask a.mask.png: empty file"),
    "text": (b"white, please", "its mask a.mask.png: not a picture"),
    "torn": (None, "its mask a.mask.png: damaged"),
    "link": (None, "its mask a.mask.png: a link to a file that is not there"),
    "black": (Image.new("L", (32, 48)), "black all over in a.mask.png, its lightest value is 0 of 255"),
    "ones": (
        square((32, 48)).point(lambda level: level // 255),
        "its lightest value is 1 of 255: nothing counts",
    ),
    "shape": (
        Image.new("L", (40, 30), 255),
        "a.mask.png: 40 x 30 px, where the picture has 32 x 48; make it",
    ),
    "turned": (
        Image.new("L", (48, 32), 255),
        "48 x 32 px, where the picture has 32 x 48; turn it as the pic",
    ),
}


@pytest.mark.parametrize("name", RUBBISH)
def test_a_picture_whose_mask_is_of_no_use_is_skipped_with_the_reason(
    folder: Path, tmp_path: Path, name: str
) -> None:
    content, reason = RUBBISH[name]
    noisy_picture(1).resize((32, 48)).save(folder / "a.png")
    noisy_picture(2).save(folder / "b.png")
    mask = folder / "a.mask.png"
    if isinstance(content, Image.Image):
        content.save(mask)
    elif name == "torn":
        mask.write_bytes(bytes_of_png(noisy_picture(5), tmp_path / "whole.png")[:900])
    elif name == "link":
        mask.symlink_to(folder / "gone.png")
    else:
        mask.write_bytes(content)
    before = sorted(os.listdir(folder))
    dataset = dataset_of(folder, Store(tmp_path / "cache"))
    assert [path.name for path in dataset.paths] == ["b.png"]
    (skipped,) = dataset.skipped
    assert skipped.path == folder / "a.png"
    assert reason in skipped.reason
    assert "\n" not in str(skipped)
    assert sorted(os.listdir(folder)) == before
    with pytest.raises(UserError, match="--strict"):
        dataset_of(folder, strict=True)


def test_a_picture_that_is_transparent_all_over_is_skipped_under_alpha_mask(folder: Path) -> None:
    picture = noisy_picture(1)
    picture.putalpha(0)
    picture.save(folder / "a.png")
    assert "transparent all over" in dataset_of(folder, alpha_mask=True).skipped[0].reason
    assert not dataset_of(folder).skipped


# ---------------------------------------------------------------- what is kept and told


def test_without_masks_keys_and_fingerprints_are_what_they_were(folder: Path) -> None:
    noisy_picture(1).save(folder / "a.png")
    dataset = dataset_of(folder, alpha_mask=True)  # an opaque picture
    (crop,) = dataset.crops(0)
    assert crop.key == key_of(crop.digest, crop.bucket, crop.at, crop.is_mirrored)
    assert dataset.fingerprint == f"1 with sum {key_of(f'{crop.digest} 32x32 1 mega man')[:12]}"


def test_another_mask_is_encoded_anew_and_the_same_is_remembered(
    folder: Path, tmp_path: Path, tiny_base: StableDiffusion
) -> None:
    noisy_picture(1).save(folder / "a.png")
    (tmp_path / "cache").mkdir()
    found, prints = [], []
    for box in (BOX, BOX, (0, 0, 8, 8)):
        square(box=box).save(folder / "a.mask.png")
        store = Store(tmp_path / "cache")
        encoded = encoded_of(folder, tiny_base, store)
        found.append((*encoded.means, *encoded.masks))
        prints.append((dataset_of(folder).fingerprint, store.misses))
    assert prints[0][0] == prints[1][0] != prints[2][0]
    assert [misses for _, misses in prints][1:] == [0, 1]
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))


def told_in(weights: Path) -> dict[str, str]:
    """The metadata that other tools read."""
    data = (weights / "megaman_lora.safetensors").read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def with_masks(folder: Path) -> None:
    """Masks for two of the six pictures of 40 x 48 px."""
    for i in (0, 3):
        square((40, 48), (8, 8, 32, 40)).save(folder / f"megaman_{i}.mask.png")


def test_a_masked_run_resumes_to_the_bit_and_with_other_masks_not_at_all(
    train: Callable[..., Path], folder_of_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--preserve_weight", "1", "--flip"]
    plain = train(*flags, "--output_dir", str(tmp_path / "plain"))
    with_masks(folder_of_pictures)
    weights = train(*flags)
    whole = weights_in(weights)
    assert any(not torch.equal(other, whole[name]) for name, other in weights_in(plain).items())
    assert [told_in(folder).get("ss_masked_loss") for folder in (plain, weights)] == [None, "True"]
    assert "masks: 2 pictures; of each 40% counts in the mean" in capsys.readouterr().err
    begun = str(tmp_path / "out" / "checkpoints" / "step-000002")
    resumed = weights_in(train(*flags, "--resume_from_checkpoint", begun))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    square((40, 48), (8, 8, 33, 40)).save(folder_of_pictures / "megaman_0.mask.png")
    with pytest.raises(UserError, match=r"can't be resumed: pictures, captions, repeats or masks"):
        train(*flags, "--resume_from_checkpoint", begun)


def test_masks_are_told_and_shown(folder: Path, tiny_base: StableDiffusion) -> None:
    noisy_picture(1).resize((96, SIDE)).save(folder / "a.png")
    square((96, SIDE), (0, 0, 20, SIDE)).save(folder / "a.mask.png")
    noisy_picture(2).save(folder / "b.png")
    square().save(folder / "b.mask.png")
    noisy_picture(3).save(folder / "c.png")
    settings = DataFlags(resolution=SIDE, crop="center")
    report = report_of(MegaManDataset(folder, tiny_base.tokenizer, settings, cell_px=8))
    lines = report.lines()
    assert "masks: 2 pictures; of each 22% counts in the mean, and no loss is counted elsewhere" in lines
    assert any("1 picture with nothing in the frame that its mask lets count" in line for line in lines)
    page = report.html()
    assert page.count('class="shade') == 2
    assert "2 masked: no loss is counted where it is red" in page
    assert "masked: 23 % counts" in page
    assert "masked: nothing in the frame counts" in page
    (folder / "a.mask.png").unlink()
    (folder / "b.mask.png").unlink()
    bare = report_of(MegaManDataset(folder, tiny_base.tokenizer, settings, cell_px=8))
    assert not any(line.startswith("masks") for line in bare.lines())
    assert "shade" not in bare.html().split("</style>")[1]
    wanted = MegaManDataset(folder, tiny_base.tokenizer, replace(settings, alpha_mask=True), cell_px=8)
    assert any("masks: none" in line for line in report_of(wanted).lines())
