"""The loss and the learning rate, against diffusers' own."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from adapted import inject_lora
from conftest import crop_of
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from megaman.common.cache import Store
from megaman.common.console import UserError
from megaman.config.train import TrainConfig, read_config
from megaman.data.captions import mirrored
from megaman.lora.injection import ADAPTER_NAME, lora_modules
from megaman.model.stable_diffusion import StableDiffusion
from megaman.model.text import Text
from megaman.training.encoding import Captions, encode
from megaman.training.objective import (
    Batch,
    denoising_losses,
    draw_example,
    make_batch,
    noise_of,
    preserving_losses,
)
from megaman.training.sampler import Position, generator_of
from megaman.training.schedule import lr_at


class Silent(torch.nn.Module):
    """Predicts zero, so that the loss is the target's square."""

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (torch.zeros_like(noisy),)


@pytest.fixture
def draw() -> Batch:
    torch.manual_seed(1)
    timesteps = torch.tensor([0, 50, 500, 999])
    text, nothing = Text(torch.zeros(4, 77, 24)), torch.tensor([], dtype=torch.long)
    latents, noise = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    return Batch(latents, noise, timesteps, text, torch.zeros(4, 6), text[:0], text[:0], nothing)


def test_noise_offset_moves_whole_channels_and_nothing_else() -> None:
    plain, moved = (noise_of((4, 8, 6), offset, generator_of(0, "example", 3)) for offset in (0.0, 0.5))
    shift = moved - plain
    assert shift.std((1, 2)).max() < 1e-6
    assert shift.mean((1, 2)).abs().min() > 1e-3
    many = torch.stack([noise_of((4, 2, 2), 0.5, generator_of(0, "example", i)) for i in range(2000)])
    assert (
        abs(many.mean((2, 3)).std().item() - (0.25 + 0.25) ** 0.5) < 0.02
    )  # of the offset and of four draws


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_the_paper(draw: Batch, prediction_type: str) -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.register_to_config(prediction_type=prediction_type)
    snr = compute_snr(scheduler, draw.timesteps)
    weights = snr.clamp(max=5) / (snr + 1 if prediction_type == "v_prediction" else snr)
    plain = denoising_losses(Silent(), draw, scheduler, snr_gamma=0)
    weighted = denoising_losses(Silent(), draw, scheduler, snr_gamma=5)
    target = (
        scheduler.get_velocity(draw.latents, draw.noise, draw.timesteps)
        if prediction_type == "v_prediction"
        else draw.noise
    )
    torch.testing.assert_close(plain, target.square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(weighted, plain * weights)


@pytest.mark.parametrize("name", ["constant_with_warmup", "linear", "cosine"])
def test_the_rate_is_that_of_diffusers_schedulers(name: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=100)
    cfg = TrainConfig(
        lr_scheduler=name.removesuffix("_with_warmup"),
        learning_rate=1e-3,
        lr_warmup_steps=10,
        max_train_steps=100,
    )
    for step in range(100):
        if step >= 10:  # theirs begins the warm-up at zero, which wastes a step
            assert lr_at(step, cfg) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("name", ["cosine", "constant", "linear", "polynomial", "cosine_with_restarts"])
def test_every_schedule_warms_up_and_stays_within_its_peak(name: str) -> None:
    cfg = TrainConfig(lr_scheduler=name, learning_rate=2e-4, lr_warmup_steps=20, max_train_steps=200)
    rates = [lr_at(step, cfg) for step in range(200)]
    assert rates[:20] == pytest.approx([2e-4 * (i + 1) / 20 for i in range(20)])
    assert max(rates) == pytest.approx(2e-4)
    assert min(rates) >= 0
    assert (rates[-1] == 2e-4) == (name == "constant")


def test_restarts_rise_again_and_polynomial_falls_below_linear() -> None:
    common = {"learning_rate": 1.0, "lr_warmup_steps": 0, "max_train_steps": 300}
    restarts = [
        lr_at(step, TrainConfig(lr_scheduler="cosine_with_restarts", **common)) for step in range(300)
    ]
    assert sum(later > earlier for earlier, later in pairwise(restarts)) == 2
    middle = [lr_at(150, TrainConfig(lr_scheduler=name, **common)) for name in ("polynomial", "linear")]
    assert middle == pytest.approx([0.25, 0.5])


@pytest.fixture
def preserving(tiny_base: StableDiffusion, tmp_path: Path) -> tuple[StableDiffusion, Batch]:
    """A base with an untrained LoRA, and a batch whose class is a knight or a robot."""
    cfg = TrainConfig(preserve_weight=1.0, preserve_class=["knight", "robot"])
    crops = [[crop_of(tmp_path, value)] for value in (-0.5, 0.5)]
    classes = [["a knight", "a robot"], ["a knight, red", "a robot, red"]]
    encoded = encode(crops, Captions([["mega man"], ["mega man, red"]], classes), tiny_base, Store(None))
    inject_lora(tiny_base.unet, cfg)
    places = [Position(i, i % 2) for i in range(8)]
    return tiny_base, make_batch(places, encoded, cfg, tiny_base.scheduler)


def test_an_untrained_lora_strays_nowhere_and_its_own_errors_are_the_plain_ones(
    preserving: tuple[StableDiffusion, Batch],
) -> None:
    base, draw = preserving
    own, strayed = preserving_losses(base.unet, draw, base.scheduler, 5.0)
    assert strayed.max() < 1e-10
    torch.testing.assert_close(own, denoising_losses(base.unet, draw, base.scheduler, 5.0))


def test_what_strays_is_the_difference_from_the_base_under_the_class_caption(
    preserving: tuple[StableDiffusion, Batch],
) -> None:
    base, draw = preserving
    unet = base.unet.requires_grad_(False)
    assert draw.class_of.tolist() == [0, 4]
    noisy = base.scheduler.add_noise(draw.latents, draw.noise, draw.timesteps)[draw.class_of]
    timesteps = draw.timesteps[draw.class_of]
    before = unet(noisy, timesteps, draw.class_text.states).sample
    for layer in lora_modules(unet).values():
        torch.nn.init.normal_(layer.lora_B[ADAPTER_NAME].weight, std=0.05)
    after = unet(noisy, timesteps, draw.class_text.states).sample
    own, strayed = preserving_losses(unet, draw, base.scheduler, snr_gamma=0)
    assert strayed.min() > 1e-6
    torch.testing.assert_close(strayed, (after - before).square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(own, denoising_losses(unet, draw, base.scheduler, 0))


def test_every_draw_of_a_mirrored_picture_has_the_caption_of_a_mirrored_picture(
    tiny_base: StableDiffusion, tmp_path: Path
) -> None:
    crops = [[crop, replace(crop, is_mirrored=True)] for crop in (crop_of(tmp_path, 0.5),)]
    texts, classes = ["facing left", "smiling"], ["a robot facing left", ""]
    encoded = encode(
        crops,
        Captions([texts], [classes], mirrored=partial(mirrored, trigger="mega man")),
        tiny_base,
        Store(None),
    )
    said = {}  # as it was encoded: row -> text
    for text in (*texts, *classes, "facing right", "a robot facing right"):
        ids = tiny_base.ids_of([text])[0]
        (said[text],) = (row for row in range(len(encoded.ids)) if torch.equal(encoded.ids[row], ids))
    cfg = TrainConfig(preserve_weight=1.0, caption_dropout=0.2)
    found = {False: set(), True: set()}
    for number in range(400):
        drawn = draw_example(Position(number, 0), encoded, cfg, tiny_base.scheduler)
        found[drawn.crop_row == 1] |= {drawn.text_row, drawn.class_row}
    whatever = {None, said["smiling"], said[""]}
    assert found[False] == whatever | {said["facing left"], said["a robot facing left"]}
    assert found[True] == whatever | {said["facing right"], said["a robot facing right"]}
    assert (
        encode(crops, Captions([["smiling"]], mirrored=str.upper), tiny_base, Store(None)).origins[
            "left and right in captions of mirrored pictures"
        ]
        is not None
    )
    straight = encode([crops[0][:1]], Captions([texts], mirrored=str.upper), tiny_base, Store(None))
    assert not straight.of_mirrored


def test_a_class_that_nothing_preserves_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--preserve_class wizard.*--preserve_weight"):
        TrainConfig(preserve_class=["wizard"])
    off = ["--preset", "demo", "--preserve_weight", "0"]
    with pytest.raises(UserError, match=r"--preserve_class wizard.*--preserve_weight"):
        read_config([*off, "--preserve_class", "wizard"])
    assert read_config(off)[0].preserve_class == ["robot"]  # the preset's belong to its weight
    file = tmp_path / "settings.json"
    file.write_text('{"preserve_weight": 2, "preserve_class": ["wizard", ""]}')
    read = ["--config", str(file)]
    assert read_config(read)[0].preserve_class == ["wizard", ""]
    assert read_config([*read, "--preserve_weight", "0"])[0].preserve_class == ["robot"]
    file.write_text('{"preserve_weight": 0, "preserve_class": ["wizard"]}')
    with pytest.raises(UserError, match=r"--preserve_class wizard.*--preserve_weight"):
        read_config(read)
