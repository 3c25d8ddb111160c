"""How pictures come about faster, and that they stay the same: texts read once, weights switched, saving
beside the drawing.
"""

import errno
import json
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from adapted import inject_lora
from PIL import Image
from torch import Tensor, nn

import generate_megaman
from megaman.common.kinds import SD1, SD2, XL, Kind
from megaman.config.generate import GenerateConfig
from megaman.config.train import TrainConfig
from megaman.generation import gallery, records
from megaman.generation.saving import TIMES_AS_LONG, Laps, Seldom, beside
from megaman.lora.adapter import Adapter, LoraLayer
from megaman.lora.merge import MergedAdapter
from megaman.model import drawing, int8
from megaman.model.drawing import SAMPLERS, draw, pipeline_of, words
from megaman.model.read_once import text_read_once
from megaman.model.stable_diffusion import StableDiffusion, load_base

CPU = torch.device("cpu")
STEPS = 3


def pictures_of(base: StableDiffusion, sampler: str = "dpm++", guidance: float = 7.5) -> list[bytes]:
    """The pixels of two prompts."""
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    texts = words(base, ["a", "b"], ["", "c"])
    settings = {"num_inference_steps": STEPS, "width": 32, "height": 32, "guidance_scale": guidance}
    made = draw(base, pipeline_of(base, sampler), generators=generators, **texts, **settings)
    return [picture.tobytes() for picture in made]


def readers(unet: nn.Module) -> list[nn.Module]:
    """The layers that see nothing but the text."""
    return [module for name, module in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]


def counted(layer: nn.Module, calls: list[nn.Module]) -> Callable[[Tensor], Tensor]:
    """The layer's forward, which notes each call."""
    honest = layer.forward

    def forward(states: Tensor) -> Tensor:
        calls.append(layer)
        return honest(states)

    return forward


# ---------------------------------------------------------------- one batch, texts read once


@pytest.mark.parametrize(("guidance", "rows"), [(7.5, 4), (1.0, 2)])
def test_a_step_is_one_call_of_the_unet_for_both_texts_and_without_guidance_for_one(
    plain: StableDiffusion, guidance: float, rows: int
) -> None:
    seen: list[int] = []
    handle = plain.unet.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    try:
        pictures_of(plain, guidance=guidance)
    finally:
        handle.remove()
    assert seen == [rows] * STEPS


@pytest.mark.parametrize("kind", [SD1, SD2, XL], ids=lambda kind: kind.folder)
def test_a_text_is_read_once_and_pictures_stay_as_they_were(
    tiny_folders: Callable[[Kind], Path], monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    base = load_base(str(tiny_folders(kind)), device=CPU, dtype=torch.float32)
    layers = readers(base.unet)
    calls: list[nn.Module] = []
    own = {layer: counted(layer, calls) for layer in layers}
    for layer, forward in own.items():
        layer.forward = forward
    for sampler in SAMPLERS if kind is SD1 else ("dpm++", "euler_a"):
        calls.clear()
        once = pictures_of(base, sampler)
        assert len(calls) == len(layers) > 0
        with monkeypatch.context() as patch:
            patch.setattr(drawing, "text_read_once", nullcontext)
            assert pictures_of(base, sampler) == once, sampler
        assert len(calls) == len(layers) * (1 + STEPS)
    assert all(vars(layer)["forward"] is forward for layer, forward in own.items())


def bare(unet: nn.Module) -> None:
    """Leaves it as it is."""


def adapted(unet: nn.Module) -> None:
    """Wraps it as a run does, with a LoRA that does something."""
    inject_lora(unet, TrainConfig())
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)


@pytest.mark.parametrize("prepare", [bare, adapted, int8.store_in_int8])
def test_another_text_is_read_anew_and_training_as_ever(
    plain: StableDiffusion, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[nn.Module], None]
) -> None:
    monkeypatch.setattr(int8, "SMALLEST_LAYER", 1)
    unet = deepcopy(plain.unet)
    prepare(unet)
    unet.eval()
    first, second = (torch.randn((1, 7, unet.config.cross_attention_dim)) for _ in range(2))
    latents = torch.randn((1, 4, 16, 16))

    def out(states: Tensor) -> Tensor:
        return unet(latents, 500, states).sample

    with torch.no_grad():
        wanted = [out(states) for states in (first, second)]
        with text_read_once(unet):
            found = [out(states) for states in (first, first, second, first.clone())]
    assert all(map(torch.equal, found, [wanted[0], wanted[0], wanted[1], wanted[0]]))
    first.requires_grad_()
    with text_read_once(unet):
        gradients = [torch.autograd.grad(out(first).sum(), first)[0] for _ in range(2)]
    assert gradients[0].any()
    assert torch.equal(*gradients)


def test_nothing_of_a_text_is_left_behind_even_by_an_error(plain: StableDiffusion) -> None:
    layer = readers(plain.unet)[0]
    states = torch.randn((1, 7, plain.unet.config.cross_attention_dim))

    def draw_and_fail() -> weakref.ref[Tensor]:
        with torch.no_grad(), pytest.raises(MemoryError), text_read_once(plain.unet):
            kept = weakref.ref(layer(states))
            assert kept() is not None
            raise MemoryError
        return kept

    assert draw_and_fail()() is None
    assert not any("forward" in vars(each) for each in readers(plain.unet))


def test_compiled_blocks_are_left_alone(plain: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = deepcopy(plain.unet)
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)  # its own takes seconds to load
    unet.compile_repeated_blocks()
    with text_read_once(unet):
        assert not any("forward" in vars(layer) for layer in readers(unet))


# ---------------------------------------------------------------- strengths


def an_adapter(unet: nn.Module, *, is_dora: bool) -> Adapter:
    """Random updates of a UNet's attentions and first convolutions."""
    torch.manual_seed(1)
    layers = {}
    for name, module in unet.named_modules():
        if name.endswith(("to_q", "to_v", "conv1")):
            rows, *others = module.weight.shape
            ones = [1] * (len(others) - 1)
            magnitude = torch.rand((rows, 1, *ones)) if is_dora else None
            down, up = torch.randn((4, *others)), torch.randn((rows, 4, *ones))
            layers["unet", name] = LoraLayer(down, up, 3.0, magnitude)
    return Adapter(layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("is_dora", [False, True])
def test_every_strength_is_summed_from_the_base_and_rounded_once(
    plain: StableDiffusion, dtype: torch.dtype, is_dora: bool
) -> None:
    unet = deepcopy(plain.unet).to(dtype)
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    adapter = an_adapter(unet, is_dora=is_dora)
    merged = MergedAdapter(adapter, {"unet": unet}, SD1)
    for scale in (0.3, 0.7, -1.0, 0.3):
        merged.set_scale(scale)
        for (_, name), layer in adapter.layers.items():
            base = before[f"{name}.weight"].float()
            wanted = (base + scale * layer.change(base)).to(dtype)
            assert torch.equal(unet.get_submodule(name).weight, wanted), name
    merged.set_scale(0.0)
    assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())


def test_a_strength_that_is_there_already_costs_nothing_and_a_look_copies_nothing(
    plain: StableDiffusion,
) -> None:
    unet = deepcopy(plain.unet)
    merged = MergedAdapter(an_adapter(unet, is_dora=False), {"unet": unet}, SD1)
    weight = merged.targets[0][0]

    def writes(scale: float) -> int:
        before = weight._version
        merged.set_scale(scale)
        return weight._version - before

    assert (writes(0.0), len(merged.originals)) == (0, 0)
    assert [writes(scale) for scale in (0.5, 0.5, 1.0, 0.0, 0.0)] == [1, 0, 1, 1, 0]


def test_a_switch_that_memory_cuts_short_is_made_anew(
    plain: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = deepcopy(plain.unet)
    merged = MergedAdapter(an_adapter(unet, is_dora=False), {"unet": unet}, SD1)
    merged.set_scale(0.5)
    before = [weight.clone() for weight, _ in merged.targets]
    honest, calls = LoraLayer.change, iter(range(99))

    def dying(layer: LoraLayer, weight: Tensor) -> Tensor:
        if next(calls) == 2:
            raise MemoryError
        return honest(layer, weight)

    monkeypatch.setattr(LoraLayer, "change", dying)
    with pytest.raises(MemoryError):
        merged.set_scale(1.0)
    assert not torch.equal(merged.targets[0][0], before[0])
    merged.set_scale(0.5)
    assert all(torch.equal(weight, was) for (weight, _), was in zip(merged.targets, before, strict=True))


# ---------------------------------------------------------------- beside the drawing


def test_pieces_are_done_in_order_and_one_at_a_time_and_the_last_at_the_end() -> None:
    done: list[object] = []
    with beside(lambda: done.append("end")) as do:
        for i in range(5):
            do(lambda i=i: (time.sleep(0.01 * (i == 1)), done.append(i)))
    assert done == [*range(5), "end"]


def fail() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_a_piece_fails_with_is_raised_and_what_was_given_is_done() -> None:
    done: list[object] = []
    with pytest.raises(OSError, match="No space"), beside(lambda: done.append("end")) as do:
        do(fail)
        do(lambda: done.append("given"))
        done.append("never reached")
    assert done == ["given", "end"]
    with pytest.raises(OSError, match="No space"), beside(lambda: done.append("end")) as do:
        do(fail)  # the last of all
    with pytest.raises(KeyboardInterrupt), beside(lambda: done.append("shown")) as do:
        do(lambda: done.append("saved"))
        raise KeyboardInterrupt
    assert done[-2:] == ["saved", "shown"]


def test_what_grows_takes_at_most_a_twentieth_of_the_time() -> None:
    now_s, at_work_s = 0.0, 0.0

    def write() -> None:
        nonlocal now_s, at_work_s
        took_s = 0.01 * now_s  # as many pictures, as long it takes
        now_s += took_s
        at_work_s += took_s

    page = Seldom(write, lambda: now_s)
    for _ in range(1000):
        now_s += 0.1
        page.do()
        assert at_work_s > 0  # the first is shown at once
    assert 0.5 / TIMES_AS_LONG < at_work_s / now_s < 1.5 / TIMES_AS_LONG


@pytest.fixture
def generate(adapter_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Draws with the tiny adapter in two steps, one picture at a time; returns the page."""

    def run(*prompts: str) -> Path:
        cfg = GenerateConfig(
            lora_path=str(adapter_folder), output_dir=str(tmp_path / "gen"), num_inference_steps=2,
            prompts=list(prompts), batch_size=1,
        )  # fmt: skip
        return generate_megaman.generate(cfg)

    return run


def listed(folder: Path) -> list[str]:
    """The prompts in metadata.jsonl; their pictures are whole."""
    told = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for record in told:
        with Image.open(folder / record["file"]) as picture:
            picture.load()
    return [record["prompt"] for record in told]


def test_pieces_of_work_that_begin_before_the_last_has_ended_share_the_time() -> None:
    ends = iter([4.0, 7.0, 10.0])
    laps = Laps(lambda: next(ends))
    assert [laps.end(began) for began in (1.0, 2.0, 9.0)] == [3.0, 3.0, 1.0]


def test_a_batch_is_saved_while_the_next_one_is_drawn(
    generate: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest_render, honest_save = generate_megaman.render, records.save_picture
    is_drawing_next = threading.Event()
    waited: list[bool] = []

    def render(batch: list[records.Job], *rest: object) -> object:
        if batch[0].prompt == "b":
            is_drawing_next.set()
        return honest_render(batch, *rest)

    def save_picture(*args: object, **named: object) -> None:
        waited.append(is_drawing_next.wait(timeout=20))
        honest_save(*args, **named)

    monkeypatch.setattr(generate_megaman, "render", render)
    monkeypatch.setattr(records, "save_picture", save_picture)
    page = generate("a", "b", "c")
    assert waited == [True] * 3
    assert listed(page.parent) == ["a", "b", "c"]


def test_a_disk_that_is_full_ends_the_run_and_keeps_what_was_saved(
    generate: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    honest = records.save_picture

    def save_picture(image: Image.Image, record: records.ImageRecord, *rest: Path, described: bool) -> None:
        if record.prompt == "b":
            fail()
        honest(image, record, *rest, described=described)

    monkeypatch.setattr(records, "save_picture", save_picture)
    with pytest.raises(OSError, match="No space"):
        generate("a", "b", "c", "d", "e")
    assert listed(tmp_path / "gen") == ["a", "c"]  # c was drawn when b could not be saved
    assert (tmp_path / "gen" / "index.html").read_text().count('<a class="card"') == 2


def test_a_killed_run_finds_every_picture_that_was_saved_however_seldom_the_page_is_written(
    generate: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    honest, before_the_end = gallery.show_all, []

    def show_all(output: Path, drawn: list[records.ImageRecord]) -> None:
        before_the_end.extend(listed(output))
        honest(output, drawn)

    monkeypatch.setattr(Seldom, "do", lambda page: None)
    monkeypatch.setattr(gallery, "show_all", show_all)
    page = generate("a", "b", "c")
    assert before_the_end == ["a", "b", "c"]
    assert page.read_text().count('<a class="card"') == 3
