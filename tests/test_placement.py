"""Everything lies where it computes: training, measuring and drawing on a card that is imitated."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import TEXT, crop_of
from fake_card import CARD, fake_card
from PIL.Image import Image

import generate_megaman
import megaman_lora
from megaman.common.cache import Store
from megaman.common.console import UserError
from megaman.common.kinds import SD1, SD2, UNET, XL, Kind
from megaman.generation.records import Job
from megaman.lora.adapter import Adapter, LoraLayer
from megaman.lora.merge import MergedAdapter
from megaman.model import compute, decoding, drawing, memory, stable_diffusion
from megaman.model.decoding import Decoded, Decoder
from megaman.model.stable_diffusion import StableDiffusion, load_base
from megaman.training import checkpoints, validation
from megaman.training.encoding import Captions, encode
from megaman.training.tracker import SilentTracker

CPU = torch.device("cpu")
CROWDED_GIB = 1e-3  # no room for two parts


def devices_of_work(base: StableDiffusion) -> set[torch.device]:
    """Where the UNet's weights and the latents lie at each of its calls from now on."""
    seen = set()
    base.unet.register_forward_pre_hook(lambda unet, given: seen.update((unet.device, given[0].device)))
    return seen


class Shown(SilentTracker):
    """Keeps what is measured and drawn."""

    def __init__(self) -> None:
        super().__init__(range(9), [""] * 6)
        self.losses: list[float] = []
        self.pictures: list[Image] = []

    def record_validation(self, step: int, loss: float) -> None:
        """Notes the loss."""
        self.losses.append(loss)

    def show_samples(self, step: int, prompts: object, images: list[Image]) -> None:
        """Notes the pictures."""
        self.pictures += images


def base_for_a_card(folder: Path) -> StableDiffusion:
    """A base in half precision that will be placed on the card; its parts still lie on the CPU."""
    base = load_base(str(folder), device=CPU, dtype=torch.float16)
    base.device = CARD
    return base


@pytest.fixture
def set_up_on_a_card(
    base_folder: Path, train_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., megaman_lora.Run]:
    """A run with further flags as it is set up on a card. It has no backward."""

    def start(*_: object, **__: object) -> tuple[Accelerator, torch.dtype]:
        accelerator = compute.new_accelerator(CPU, torch.float32)
        accelerator.state.device = CARD
        monkeypatch.setattr(accelerator, "backward", lambda loss: None)
        return accelerator, torch.float16

    monkeypatch.setattr(compute, "start", start)
    base = base_for_a_card(base_folder)
    monkeypatch.setattr(stable_diffusion, "load_base", lambda *_, **__: base)
    monkeypatch.setattr(megaman_lora, "open_store", lambda _: Store(None))
    return lambda *flags: megaman_lora.set_up(megaman_lora.read_config([*train_flags, *flags])[0])


@pytest.mark.parametrize(
    ("base_folder", "flags", "gib"),
    [
        (SD1, "--lora_targets conv --base_weights int8 --ema_decay 0.9 --noise_offset 0.1", CROWDED_GIB),
        (SD2, "--lora_targets linear --use_dora --preserve_weight 1 --max_tokens 150 --flip", 24),
        (XL, "--crop center", CROWDED_GIB),
        (XL, " ".join([*TEXT, "--text_encoder_stop 0.5 --preserve_weight 1"]), 24),
    ],
    ids=lambda value: value.folder if isinstance(value, Kind) else str(value),
    indirect=["base_folder"],
)
def test_steps_measuring_and_previews_find_everything_on_the_card(
    set_up_on_a_card: Callable[..., megaman_lora.Run],
    folder_of_pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: str,
    gib: float,
) -> None:
    monkeypatch.setattr(validation, "TIMESTEPS", (500,))
    monkeypatch.setattr(validation, "SAMPLE_STEPS", 1)
    for i in range(2, 6):
        (folder_of_pictures / f"megaman_{i}.png").unlink()
    (folder_of_pictures / "megaman_0.txt").write_text("mega man, " + "blue robot, " * 40, encoding="utf-8")
    with fake_card(gib):
        run = set_up_on_a_card(*flags.split())
        assert {value.device for value in run.trainable.values()} == {CARD}
        assert {value.device for value in (*run.encoded.means, *run.encoded.stds)} == {CARD}
        assert {value.device for value in run.ema.kept.values()} <= {CARD}
        assert run.base.is_crowded == (gib == CROWDED_GIB)
        assert run.base.vae.device == CPU
        shown, devices = Shown(), devices_of_work(run.base)
        run.data = replace(run.data, held_out=frozenset({0}))
        for step in (0, 3) if run.base.encoders else (0,):  # they learn, and rest
            assert megaman_lora.forward_backward(run, run.data.sampler.batch(step), step).mean.device == CARD
        megaman_lora.validate(run, shown, step)
        megaman_lora.draw_samples(run, shown, step, False)
        assert devices == {run.base.unet.device} == {CARD}
        assert run.base.vae.device == CPU
    assert len(shown.losses) == 1
    assert len(shown.pictures) == len(run.cfg.validation_prompt)


def test_a_checkpoint_goes_back_to_the_card(set_up_on_a_card: Callable[..., megaman_lora.Run]) -> None:
    with fake_card():
        run = set_up_on_a_card("--ema_decay", "0.9")
        names = [*run.trainable]
        shapes = [tuple(value.shape) for value in run.trainable.values()]
        kept = {
            f"{key}.{name}": torch.ones(shape)
            for key in ("parameter", "exp_avg", "exp_avg_sq", "average")
            for name, shape in zip(names, shapes, strict=True)
        } | {f"step.{name}": torch.tensor(3.0) for name in names}
        checkpoints.restore(run.trainable, run.optimizer, run.ema.take_from(kept))
        assert {value.device for value in run.trainable.values()} == {CARD}
        for value in run.trainable.values():
            state = run.optimizer.state[value]
            assert [state[key].device for key in ("exp_avg", "exp_avg_sq", "step")] == [CARD] * 3
        saved = checkpoints.tensors_of(run.trainable, run.optimizer) | run.ema.tensors()
        assert {value.device for value in saved.values()} == {CPU}


def small_adapter(base: StableDiffusion) -> Adapter:
    """A LoRA and a DoRA of the UNet, and a LoRA of each text encoder."""
    layers = {}
    for part, model in base.parts.items():
        found = [name for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)]
        for number, name in enumerate(found[: 2 if part == UNET else 1]):
            rows, columns = model.get_submodule(name).weight.shape
            magnitude = torch.ones(rows, 1) if number else None
            layers[part, name] = LoraLayer(torch.ones(2, columns), torch.ones(rows, 2), 1.0, magnitude)
    return Adapter(layers, {}, base.kind)


@pytest.mark.parametrize(
    ("base_folder", "gib", "free_gib", "is_beside"),
    [(SD1, 24, None, True), (SD1, 24, 2.4, False), (XL, CROWDED_GIB, None, False)],
    ids=["sd1", "sd1, full", "xl, crowded"],
    indirect=["base_folder"],
)
def test_pictures_are_drawn_on_the_card(
    base_folder: Path, gib: float, free_gib: float | None, is_beside: bool
) -> None:
    base = base_for_a_card(base_folder)
    base.max_chunks, base.reads_weights = 2, True
    shared = {"negative_prompt": "grey", "num_inference_steps": 1, "guidance_scale": 5.0, "width": 36}
    jobs = [Job(prompt=words, seed=3, lora_scale=1.0, scheduler="euler_a", height=32, **shared)
            for words in ("a (robot:1.2)", "a BREAK knight")]  # fmt: skip
    with fake_card(gib, free_gib):
        base.is_crowded = gib == CROWDED_GIB
        base.place(*(() if base.is_crowded else ("vae", *base.parts)))
        devices = devices_of_work(base)
        merged = MergedAdapter(small_adapter(base), base.parts, base.kind)
        decoder = Decoder(base)
        drawn = generate_megaman.render(jobs, base, merged, decoder)
        assert [each.picture().size for each in drawn] == [(36, 32)] * 2
        assert devices == {CARD}
        beside = ["waits", "keeps (2, 4, 16, 18)", "begins", "an event", "an event", *["is waited for"] * 2]
        assert decoder.stream.told == (beside if is_beside else [])
        merged.set_scale(0)


def test_what_was_decoded_beside_the_drawing_is_so_until_there_is_more_of_it(tiny_folder: Path) -> None:
    base = base_for_a_card(tiny_folder)
    small, large = (torch.zeros(1, 4, side, side) for side in (8, 16))
    freed: list[bool] = []
    with fake_card(), pytest.MonkeyPatch.context() as patch:
        base.place("vae", UNET)
        patch.setattr(torch.cuda, "empty_cache", lambda: freed.append(base.is_roomy))
        with closing(Decoder(base)) as decoder:
            for latents, has_room, is_beside in (
                (small, False, False), (small, True, True), (small, False, True), (large, False, False)
            ):  # fmt: skip
                patch.setattr(decoding, "_has_room", lambda *_, has_room=has_room: has_room)
                before = len(decoder.stream.told), len(freed)
                decoder.start(latents.to(CARD))
                assert (len(decoder.stream.told) > before[0]) == base.is_roomy == is_beside
                assert (len(freed) > before[1]) != is_beside  # which would wait for the drawing
            base.place(UNET)
            patch.setattr(decoding, "_has_room", lambda *_: True)
            before = len(decoder.stream.told), len(freed)
            decoder.start(small.to(CARD))  # its VAE comes and goes
            assert len(decoder.stream.told) == before[0]
            base.is_roomy = True
            freed.clear()
        assert (freed, base.is_roomy) == ([False], False)


def test_decoding_beside_the_drawing_gives_way_to_it(tiny_folder: Path) -> None:
    base = base_for_a_card(tiny_folder)
    latents = torch.zeros(1, 4, 8, 8)
    with fake_card():
        base.place("vae", UNET)
        decoder = Decoder(base)
        assert not Decoder(base).gives_way()  # nothing was
        decoder.start(latents.to(CARD))
        stream = decoder.stream
        drawn = [MemoryError, MemoryError, ["a picture"]]

        def draw(_: object) -> list[str]:
            if drawn[0] is MemoryError:
                raise drawn.pop(0)
            return drawn[0]

        limit = memory.BatchLimit(gives_way=decoder.gives_way)
        with pytest.raises(UserError, match="out of memory with one picture"):
            limit.drawn([1], draw, 64)  # the second time there is nothing left that gives way
        assert drawn == [["a picture"]]
        told = len(stream.told)
        decoder.start(latents.to(CARD))
        assert (len(stream.told), base.is_roomy) == (told, False)


def test_a_picture_is_read_when_the_card_is_done_with_it() -> None:
    pixels, is_whole = torch.zeros(2, 3, 3, dtype=torch.uint8), torch.tensor(False)

    class Done:
        def synchronize(self) -> None:
            pixels.fill_(7)
            is_whole.fill_(True)

    picture = Decoded(pixels, is_whole, Done()).picture()
    assert (picture.size, picture.getpixel((2, 1))) == ((3, 2), (7, 7, 7))


def test_a_forgotten_way_to_the_card_is_an_error(tiny_folder: Path, tmp_path: Path) -> None:
    """What the imitation itself must refuse, or the tests above could not fail."""
    base = base_for_a_card(tiny_folder)
    with fake_card():
        on_card, on_cpu = torch.zeros(3, 4, device=CARD), torch.zeros(3, 4)
        assert on_card[torch.tensor([0, 1])].shape == on_card[[0, 1]].shape == (2, 4)
        for wrong in (
            lambda: on_card + on_cpu,
            lambda: torch.stack([on_card, on_cpu]),
            lambda: torch.nn.functional.linear(on_card, on_cpu),
            lambda: on_cpu[torch.tensor([0], device=CARD)],
            lambda: torch.randn(3, generator=torch.Generator(), device=CARD),
            lambda: on_card.numpy(),
            lambda: base.vae.encode(torch.zeros(1, 3, 32, 32, device=CARD)),
            lambda: torch.nn.functional.conv2d(on_cpu[None], on_card[None, None]),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
        encoded = encode([[crop_of(tmp_path, 0.5)]], Captions([["a"]]), base, Store(None))
        assert (encoded.device, encoded.text.device, encoded.ids.device) == (CARD, CARD, CPU)
        base.place("vae")
        with pytest.raises(RuntimeError):  # its UNet is elsewhere
            base.unet(encoded.means[0][None].half(), torch.tensor(3), encoded.text.states)
        assert drawing.noise_of(base, 32, 32, [torch.Generator()]).device == CPU
