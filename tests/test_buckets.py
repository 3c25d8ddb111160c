"""Which size a picture is trained at, and which part of it is seen."""

import random

import pytest
import torch
from PIL import Image

from megaman.common.console import UserError
from megaman.data.buckets import Bucket, bucket_for, buckets_of, check_sizes, cut_out, fit_of


@pytest.mark.parametrize(("resolution", "cell"), [(512, 64), (768, 64), (256, 64), (64, 16), (32, 4)])
def test_buckets_are_cells_of_no_more_area_than_the_square_and_hold_the_square(
    resolution: int, cell: int
) -> None:
    offered = buckets_of(resolution, cell, "bucket")
    assert Bucket(resolution, resolution) in offered
    assert len(offered) > 3
    for bucket in offered:
        assert bucket.width % cell == bucket.height % cell == 0
        assert bucket.width * bucket.height <= resolution**2
        assert Bucket(bucket.height, bucket.width) in offered
        assert 1 / 4 <= bucket.width / bucket.height <= 4


def test_a_cut_square_is_the_only_size_without_buckets() -> None:
    assert buckets_of(512, 64, "center") == buckets_of(512, 64, "random") == [Bucket(512, 512)]


@pytest.mark.parametrize(("resolution", "nearest"), [(700, 704), (660, 640), (10, 64)])
def test_a_resolution_that_can_t_be_trained_at_is_told_the_nearest_that_can(
    resolution: int, nearest: int
) -> None:
    for crop in ("bucket", "center"):
        offered = buckets_of(resolution, 64, crop)
        with pytest.raises(UserError, match=f"multiples of 64; {nearest} is the nearest") as error:
            check_sizes(offered, resolution, 64, "a base")
        assert error.value.exit_code == 2
    check_sizes(buckets_of(nearest, 64, "bucket"), nearest, 64, "a base")


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1000, 1000), Bucket(512, 512)),
        ((1920, 1080), Bucket(640, 384)),  # 1.78 lies between 640x384 (1.67) and 704x320 (2.2)
        ((1080, 1920), Bucket(384, 640)),
        ((100, 150), Bucket(384, 640)),  # 0.6, nearer to 0.67 than the 0.78 of 448x576; as kohya cuts
        ((4000, 100), Bucket(1024, 256)),
    ],
)
def test_a_picture_goes_to_the_nearest_shape(size: tuple[int, int], bucket: Bucket) -> None:
    assert bucket_for(size, buckets_of(512, 64, "bucket")) == bucket


def test_the_window_has_the_buckets_shape_and_covers_one_axis_entirely() -> None:
    rng = random.Random(0)
    offered = buckets_of(512, 64, "bucket")
    for _ in range(3000):
        size = (rng.randint(1, 3000), rng.randint(1, 3000))
        bucket, at = bucket_for(size, offered), (rng.random(), rng.random())
        fit = fit_of(size, bucket, at)
        assert 0 <= fit.left < fit.right <= size[0]
        assert 0 <= fit.top < fit.bottom <= size[1]
        whole = (
            fit.right - fit.left == pytest.approx(size[0]),
            fit.bottom - fit.top == pytest.approx(size[1]),
        )
        assert any(whole)
        assert (fit.right - fit.left) * fit.scale == pytest.approx(bucket.width)
        assert (fit.bottom - fit.top) * fit.scale == pytest.approx(bucket.height)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 3), (797, 1239), (4001, 3)])
def test_a_picture_of_any_size_gives_its_buckets_pixels(size: tuple[int, int]) -> None:
    bucket = bucket_for(size, buckets_of(256, 64, "bucket"))
    for at in ((0, 0), (0.5, 0.5), (0.3, 0.9), (1, 1)):
        pixels = cut_out(Image.new("RGB", size, "red"), bucket, at)
        assert pixels.shape == (3, bucket.height, bucket.width)
        assert pixels[:, 0, 0].tolist() == [1, -1, -1]


def test_the_middle_is_seen_and_values_stay_in_range() -> None:
    image = Image.new("RGB", (30, 10), "black")
    image.paste("white", (10, 0, 20, 10))
    pixels = cut_out(image, Bucket(16, 16))
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == torch.float32
    assert pixels[:, 8, 8].tolist() == [1, 1, 1]
    assert pixels.min() >= -1
    assert pixels.max() <= 1


def test_a_picture_in_its_own_size_is_left_as_it_is_and_a_mirrored_one_is_mirrored() -> None:
    image = Image.effect_noise((32, 48), 80).convert("RGB")
    pixels = cut_out(image, Bucket(32, 48))
    assert torch.equal(
        ((pixels + 1) * 127.5).round().byte()[0].flatten(), torch.tensor(list(image.getdata(0)))
    )
    assert torch.equal(cut_out(image, Bucket(32, 48), mirrored=True), pixels.flip(2))


def test_a_random_window_moves_along_the_long_side() -> None:
    image = Image.linear_gradient("L").resize((64, 16)).rotate(0).convert("RGB")
    image = Image.merge("RGB", [Image.linear_gradient("L").rotate(90).resize((64, 16))] * 3)
    left, right = (cut_out(image, Bucket(16, 16), (x, 0.5)).mean() for x in (0.0, 1.0))
    assert abs(left - right) > 1
