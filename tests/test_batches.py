"""Which example stands where: a pure function of (seed, position)."""

import random
import tempfile
import time
from collections import Counter
from itertools import product
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import crop_of

from megaman.common.cache import Store
from megaman.config.train import TrainConfig
from megaman.data.buckets import bucket_for, buckets_of
from megaman.model.stable_diffusion import StableDiffusion
from megaman.training.encoding import Captions, EncodedDataset, encode
from megaman.training.objective import make_batch
from megaman.training.sampler import ORDER, Position, Sampler, _pass, _turns, generator_of, micro_batches
from megaman_lora import sampler_of


def shown(stream: Sampler, steps: int) -> list[int]:
    """The pictures of the first steps, one after the other."""
    return [place.picture for step in range(steps) for place in stream.batch(step)]


def stream_of(rng: random.Random, seed: int) -> Sampler:
    """Buckets of many sizes, with pictures that repeat."""
    buckets, index = [], 0
    for _ in range(rng.randint(1, 6)):
        bucket: list[int] = []
        for _ in range(rng.randint(1, 9)):
            bucket += [index] * rng.randint(1, 4)
            index += 1
        buckets.append(tuple(bucket))
    return Sampler(tuple(buckets), step_size=rng.randint(1, 13), seed=seed)


@pytest.mark.parametrize("seed", range(40))
def test_steps_are_whole_and_all_pictures_are_seen_equally_often_at_any_time(seed: int) -> None:
    stream = stream_of(random.Random(seed), seed)
    had = [0] * len(stream.buckets)
    for step in range(3 * len(stream) + 5):
        places = stream.batch(step)
        assert [place.number for place in places] == [
            step * stream.step_size + i for i in range(stream.step_size)
        ]
        pictures = {place.picture for place in places}
        (bucket,) = [i for i, bucket in enumerate(stream.buckets) if pictures <= set(bucket)]
        had[bucket] += 1
        for members, steps in zip(stream.buckets, had, strict=True):
            fair = (step + 1) * len(members) / len(stream)  # steps that are its share by now
            assert abs(steps - fair) < 1


@pytest.mark.parametrize("seed", range(5))
def test_a_step_is_the_same_whatever_was_asked_before(seed: int) -> None:
    stream = stream_of(random.Random(seed), seed)
    steps = list(range(60))
    told = {step: stream.batch(step) for step in steps}
    random.Random(seed).shuffle(steps)
    for step in steps:
        _pass.cache_clear()
        _turns.cache_clear()
        assert stream.batch(step) == told[step]


def test_a_large_data_set_of_many_sizes_costs_no_time() -> None:
    rng = random.Random(0)
    sizes = [rng.randint(1, 1000) for _ in range(200)]
    stream = Sampler(tuple(tuple(range(size)) for size in sizes), step_size=64, seed=0)
    started = time.process_time()
    stream.batch(0)
    assert time.process_time() - started < 2  # once
    started = time.process_time()
    for step in range(100):
        stream.batch(step)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("seed", range(40))
def test_a_bucket_shows_each_picture_as_often_as_it_repeats_pass_after_pass(seed: int) -> None:
    stream = stream_of(random.Random(seed), seed)
    pictures = shown(stream, 4 * len(stream))
    for bucket in stream.buckets:
        seen = [picture for picture in pictures if picture in bucket]
        for start in range(0, len(seen) - len(bucket) + 1, len(bucket)):
            assert sorted(seen[start : start + len(bucket)]) == sorted(bucket)
    whole = [
        Counter(pictures)[picture] / bucket.count(picture) for bucket in stream.buckets for picture in bucket
    ]
    assert max(whole) == min(whole) == 4 * stream.step_size  # after as many steps as there are examples


def test_one_bucket_of_whole_steps_comes_in_the_order_of_earlier_versions() -> None:
    # By commit 1d71517's sampler, whose steps were an epoch's, shuffled.
    stream = Sampler((tuple(range(6)),), 2, seed=42)
    assert shown(stream, 6) == [0, 3, 4, 2, 5, 1, 2, 1, 3, 0, 5, 4]
    four_twice = Sampler((tuple(range(4)) * 2,), 4, seed=7)
    assert shown(four_twice, 4) == [3, 0, 1, 0, 2, 1, 3, 2, 0, 0, 2, 3, 3, 1, 2, 1]
    assert stream.origins[ORDER] is None
    for other in (Sampler((tuple(range(6)),), 4, 42), Sampler(((0, 1), (2, 3)), 2, 42)):
        assert (
            other.origins[ORDER] is not None
        )  # a checkpoint of such a run is not gone on with under another order


@pytest.mark.parametrize("crop", ["bucket", "center"])
def test_the_pictures_of_a_step_share_their_size_whatever_the_sizes(crop: str) -> None:
    rng = random.Random(crop)
    offered = buckets_of(512, 64, crop)
    for seed in range(60):
        sizes = [(rng.randint(1, 4000), rng.randint(1, 4000)) for _ in range(rng.randint(1, 40))]
        sizes += [sizes[0]] * rng.randint(0, 5)
        repeats = [rng.choice((1, 1, 1, 2, 10)) for _ in sizes]
        dataset = SimpleNamespace(
            buckets=[bucket_for(size, offered) for size in sizes], repeats=repeats, seed=seed
        )
        stream = sampler_of(dataset, rng.randint(1, 64))
        steps = [stream.batch(step) for step in range(len(stream))]
        assert all(len({dataset.buckets[place.picture] for place in step}) == 1 for step in steps)
        assert {place.picture for step in steps for place in step} == set(range(len(sizes)))


def test_each_pass_has_an_order_of_its_own_and_each_seed_others() -> None:
    stream = Sampler((tuple(range(30)),), 1, seed=3)
    pictures = shown(stream, 150)
    orders = [tuple(pictures[start : start + 30]) for start in range(0, 150, 30)]
    assert len(set(orders)) == 5
    assert orders[0] != tuple(shown(Sampler(stream.buckets, 1, seed=4), 30))


@pytest.mark.parametrize(("count", "batch"), product((1, 3, 7, 12), (1, 2, 3)))
def test_processes_and_micro_batches_cut_a_step_without_loss_or_repetition(count: int, batch: int) -> None:
    places = [Position(i, i) for i in range(count)]
    for processes in (1, 2, 3):
        shares = [micro_batches(places, rank, processes, batch) for rank in range(processes)]
        assert len({len(each) for each in shares}) == 1  # all take part in every backward pass
        assert sorted(place for each in shares for share in each for place in share) == places
        assert all(len(share) <= batch for each in shares for share in each)
    two, one = (
        [micro_batches(places, rank, 2, batch) for rank in (0, 1)],
        micro_batches(places, 0, 1, 2 * batch),
    )
    assert [list(a) + list(b) for a, b in zip(*two, strict=True)] == [list(share) for share in one]


def test_randomness_is_decided_by_seed_purpose_and_number() -> None:
    numbers = [
        torch.randn(3, generator=generator_of(*place)).tolist()
        for place in ((1, "a", 0), (1, "a", 0), (1, "a", 1), (1, "b", 0), (2, "a", 0))
    ]
    assert numbers[0] == numbers[1]
    assert len({tuple(n) for n in numbers}) == 4


def encoded_of(
    base: StableDiffusion,
    values: list[float],
    captions: list[list[str]],
    classes: list[list[str]] | None = None,
) -> EncodedDataset:
    """Plain pictures of 32 px, one crop each."""
    with tempfile.TemporaryDirectory() as folder:
        crops = [[crop_of(Path(folder), value)] for value in values]
        return encode(crops, Captions(captions, classes or []), base, Store(None))


@pytest.fixture
def encoded(tiny_base: StableDiffusion) -> EncodedDataset:
    return encoded_of(
        tiny_base, [-0.5, 0.0, 0.5, 0.0], [["mega man"], ["a wizard"], ["mega man"], ["a wizard"]]
    )


def places_of(count: int, pictures: int = 4, first: int = 0) -> list[Position]:
    return [Position(first + i, (first + i) % pictures) for i in range(count)]


def test_equal_pictures_and_captions_are_encoded_once(encoded: EncodedDataset) -> None:
    assert [tuple(mean.shape) for mean in encoded.means] == [(4, 16, 16)] * 3
    assert encoded.crop_rows == [[0], [1], [2], [1]]
    assert encoded.text.states.shape[:2] == (3, 77)
    assert encoded.text_rows == [[1], [2], [1], [2]]  # row 0 is the empty caption


def test_latents_are_the_vaes_posterior(
    encoded: EncodedDataset, tiny_base: StableDiffusion, tmp_path: Path
) -> None:
    with torch.no_grad():
        posterior = tiny_base.vae.encode(crop_of(tmp_path, 0.5).pixels()[None]).latent_dist
    assert torch.equal(encoded.means[2], posterior.mean[0] * tiny_base.vae.config.scaling_factor)
    assert torch.equal(encoded.stds[2], posterior.std[0] * tiny_base.vae.config.scaling_factor)


def test_a_batch_is_its_examples_drawn_one_by_one(
    encoded: EncodedDataset, tiny_base: StableDiffusion
) -> None:
    cfg, places = TrainConfig(caption_dropout=0.5), places_of(8, first=20)
    together = make_batch(places, encoded, cfg, tiny_base.scheduler)
    singly = [make_batch([place], encoded, cfg, tiny_base.scheduler) for place in places]
    for name in ("latents", "noise", "timesteps", "text.states", "sizes"):
        parts = [attrgetter(name)(draw) for draw in singly]
        assert torch.equal(attrgetter(name)(together), torch.cat(parts))


def test_the_posterior_is_sampled_anew_each_time_a_picture_comes_round(
    encoded: EncodedDataset, tiny_base: StableDiffusion
) -> None:
    places = [Position(position, 0) for position in range(60)]
    latents = make_batch(places, encoded, TrainConfig(), tiny_base.scheduler).latents
    deviations = (latents - encoded.means[0]) / encoded.stds[0]
    assert abs(deviations.mean()) < 0.05
    assert abs(deviations.std() - 1) < 0.05


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_caption_dropout_takes_its_share(
    encoded: EncodedDataset, tiny_base: StableDiffusion, share: float
) -> None:
    draw = make_batch(places_of(400), encoded, TrainConfig(caption_dropout=share), tiny_base.scheduler)
    empty = (draw.text.states == encoded.text.states[0]).all(dim=(1, 2)).float().mean().item()
    assert abs(empty - share) < 0.07
    assert share not in (0.0, 1.0) or empty == share


def test_variants_of_a_caption_are_drawn_per_position(tiny_base: StableDiffusion) -> None:
    encoded = encoded_of(tiny_base, [0.1], [["mega man, a, b", "mega man, b, a"]])
    draw = make_batch(places_of(60, 1), encoded, TrainConfig(caption_dropout=0), tiny_base.scheduler)
    rows = [(encoded.text.states == text).all(dim=(1, 2)).nonzero()[0].item() for text in draw.text.states]
    assert 15 < rows.count(1) < 45
    assert set(rows) == {1, 2}


def test_class_captions_stand_beside_the_pictures_own(tiny_base: StableDiffusion) -> None:
    classes = [["a robot", "a knight"], ["a robot, red", "a knight, red"]]
    encoded = encoded_of(tiny_base, [-0.5, 0.0], [["mega man"], ["mega man, red"]], classes)
    assert encoded.class_rows == [[3, 4], [5, 6]]
    cfg = TrainConfig(preserve_weight=1.0, preserve_class=["robot", "knight"])
    drawn = make_batch(places_of(200, 2), encoded, cfg, tiny_base.scheduler)
    plain = make_batch(places_of(200, 2), encoded, TrainConfig(), tiny_base.scheduler)
    assert len(plain.class_of) == len(plain.class_text) == 0
    assert torch.equal(plain.text.states, drawn.text.states)  # preserving changes nothing of what is learned
    assert drawn.class_of.tolist() == list(range(0, 200, 4))  # one in four
    rows = [
        (encoded.text.states == text).all(dim=(1, 2)).nonzero()[0].item() for text in drawn.class_text.states
    ]
    assert set(rows) == {3, 4}  # of picture 0: both classes, and never the other picture's
