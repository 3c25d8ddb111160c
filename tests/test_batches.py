"""Which example stands where: a pure function of (seed, position)."""

from collections import Counter

import pytest
import torch

from megaman.base import BaseModel
from megaman.cache import Encoded, encode
from megaman_lora import TrainConfig, draw_inputs, generator_of, index_at, positions_of


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_each_epoch_holds_each_picture_once_in_an_order_of_its_own(count: int) -> None:
    epochs = [[index_at(epoch * count + i, count, seed=3) for i in range(count)] for epoch in range(5)]
    assert all(Counter(epoch) == Counter(range(count)) for epoch in epochs)
    if count == 30:
        assert len({tuple(epoch) for epoch in epochs}) == 5
        assert epochs[0] != [index_at(i, count, seed=4) for i in range(count)]


@pytest.mark.parametrize("step", [0, 5])
def test_two_processes_take_what_one_with_twice_the_batch_takes(step: int) -> None:
    two = TrainConfig(train_batch_size=3, gradient_accumulation_steps=2)
    one = TrainConfig(train_batch_size=6, gradient_accumulation_steps=2)
    for micro_batch in range(2):
        parts = [list(positions_of(step, micro_batch, rank, 2, two)) for rank in (0, 1)]
        assert parts[0] + parts[1] == list(positions_of(step, micro_batch, 0, 1, one))


def test_positions_are_consecutive_over_steps_and_micro_batches() -> None:
    cfg = TrainConfig(train_batch_size=2, gradient_accumulation_steps=3)
    taken = [p for step in range(4) for micro in range(3) for p in positions_of(step, micro, 0, 1, cfg)]
    assert taken == list(range(24))


def test_randomness_is_decided_by_seed_purpose_and_number() -> None:
    numbers = [
        torch.randn(3, generator=generator_of(*place)).tolist()
        for place in ((1, "a", 0), (1, "a", 0), (1, "a", 1), (1, "b", 0), (2, "a", 0))
    ]
    assert numbers[0] == numbers[1]
    assert len({tuple(n) for n in numbers}) == 4


@pytest.fixture
def encoded(tiny_base: BaseModel) -> Encoded:
    pictures = [torch.full((3, 32, 32), value) for value in (-0.5, 0.0, 0.5, 0.0)]
    return encode(pictures, ["mega man", "a wizard", "mega man", "a wizard"], tiny_base)


def test_equal_pictures_and_captions_are_encoded_once(encoded: Encoded) -> None:
    assert encoded.means.shape == (3, 4, 16, 16)
    assert encoded.picture_rows.tolist() == [0, 1, 2, 1]
    assert encoded.text.shape[:2] == (3, 77)
    assert encoded.text_rows.tolist() == [1, 2, 1, 2]  # row 0 is the empty caption


def test_latents_are_the_vaes_posterior(encoded: Encoded, tiny_base: BaseModel) -> None:
    with torch.no_grad():
        posterior = tiny_base.vae.encode(torch.full((1, 3, 32, 32), 0.5)).latent_dist
    assert torch.equal(encoded.means[2], posterior.mean[0] * tiny_base.vae.config.scaling_factor)
    assert torch.equal(encoded.stds[2], posterior.std[0] * tiny_base.vae.config.scaling_factor)


def test_a_batch_is_its_examples_drawn_one_by_one(encoded: Encoded, tiny_base: BaseModel) -> None:
    cfg = TrainConfig(caption_dropout=0.5)
    together = draw_inputs(range(20, 28), encoded, cfg, tiny_base.scheduler)
    singly = [draw_inputs([position], encoded, cfg, tiny_base.scheduler) for position in range(20, 28)]
    for name in ("latents", "noise", "timesteps", "text"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(draw, name) for draw in singly]))


def test_the_posterior_is_sampled_anew_each_time_a_picture_comes_round(
    encoded: Encoded, tiny_base: BaseModel
) -> None:
    cfg = TrainConfig()
    places = [p for p in range(400) if index_at(p, len(encoded), cfg.seed) == 0][:60]
    latents = draw_inputs(places, encoded, cfg, tiny_base.scheduler).latents
    deviations = (latents - encoded.means[0]) / encoded.stds[0]
    assert abs(deviations.mean()) < 0.05
    assert abs(deviations.std() - 1) < 0.05


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_caption_dropout_takes_its_share(encoded: Encoded, tiny_base: BaseModel, share: float) -> None:
    draw = draw_inputs(range(400), encoded, TrainConfig(caption_dropout=share), tiny_base.scheduler)
    empty = (draw.text == encoded.text[0]).all(dim=(1, 2)).float().mean().item()
    assert abs(empty - share) < 0.07
    assert share not in (0.0, 1.0) or empty == share


def test_class_captions_stand_beside_the_pictures_own(tiny_base: BaseModel) -> None:
    pictures = [torch.full((3, 32, 32), value) for value in (-0.5, 0.0)]
    classes = [["a robot", "a robot, red"], ["a knight", "a knight, red"]]
    encoded = encode(pictures, ["mega man", "mega man, red"], tiny_base, classes)
    assert encoded.class_rows.tolist() == [[3, 5], [4, 6]]
    cfg = TrainConfig(preserve_weight=1.0, preserve_class=["robot", "knight"])
    drawn = draw_inputs(range(200), encoded, cfg, tiny_base.scheduler)
    plain = draw_inputs(range(200), encoded, TrainConfig(), tiny_base.scheduler)
    assert plain.class_text is None
    assert torch.equal(plain.text, drawn.text)  # preserving changes nothing of what is learned
    rows = [(encoded.text == text).all(dim=(1, 2)).nonzero()[0].item() for text in drawn.class_text]
    assert {0, 3, 4, 5, 6} == set(rows)
    assert rows.count(0) < 50
