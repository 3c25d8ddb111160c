"""What every kind of Stable Diffusion must do, end to end, and what only some of them have."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapted import steps_told, weights_in
from conftest import EVERY_KIND, TEXT, crop_of
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import generate_megaman
import megaman_lora
from megaman.common.cache import Store
from megaman.common.kinds import KINDS, SD1, SD2, XL, Kind
from megaman.config.train import TrainConfig
from megaman.data.buckets import Bucket, Crop, fit_of
from megaman.model import int8, stable_diffusion
from megaman.model.stable_diffusion import StableDiffusion, conditions, load_base, peek
from megaman.training.encoding import CaptionReader, Captions, encode
from megaman.training.objective import (
    denoising_losses,
    make_batch,
    preserving_losses,
    validation_batch,
)
from megaman.training.sampler import Position

FolderOf = Callable[[Kind], Path]
of_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.folder)


def base_of(folder: Path) -> StableDiffusion:
    return load_base(str(folder), device=torch.device("cpu"), dtype=torch.float32)


# ---------------------------------------------------------------- what a base is


@of_kinds
def test_a_folder_is_known_by_how_it_is_built(tiny_folders: FolderOf, kind: Kind) -> None:
    base, known = base_of(tiny_folders(kind)), peek(str(tiny_folders(kind)))
    assert base.kind is known.kind is kind
    assert [*base.parts] == [*kind.parts]
    assert known.cell_px == base.cell_px
    assert known.resolution == base.native_resolution == 32
    assert base.vae.dtype == torch.float32


def test_each_kind_has_its_own_resolution_where_the_user_is_silent() -> None:
    folders = {kind: peek(f"nobody/{kind.folder}") for kind in KINDS}  # nothing is known of these
    assert {facts.resolution for facts in folders.values()} == {512}
    assert (SD1.resolution, SD2.v_resolution, XL.resolution) == (512, 768, 1024)
    unet = json.loads((XL.config / "unet" / "config.json").read_text())
    vae = json.loads((XL.config / "vae" / "config.json").read_text())
    assert unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1) == 1024
    assert stable_diffusion.kind_of_config(unet) is XL


@EVERY_KIND
def test_a_picture_is_the_one_that_diffusers_draws_with_our_file(
    train: Callable[..., Path], base_folder: Path, tmp_path: Path
) -> None:
    weights = train("--learning_rate", "0.05")
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "width": 48, "height": 32}
    cfg = generate_megaman.GenerateConfig(
        lora_path=str(weights), output_dir=str(tmp_path / "drawn"), negative_prompt="blurry",
        prompts=["mega man, red"], lora_scale=[1.0, 0.0], seed=7, **settings,
    )  # fmt: skip
    generate_megaman.generate(cfg)
    drawn = {}
    for line in (tmp_path / "drawn" / "metadata.jsonl").read_text().splitlines():
        record = json.loads(line)
        drawn[record["lora_scale"]] = Image.open(tmp_path / "drawn" / record["file"])
    pipeline = DiffusionPipeline.from_pretrained(base_folder)
    pipeline.set_progress_bar_config(disable=True)
    base = base_of(base_folder)
    scheduler = generate_megaman.drawing.SAMPLERS["dpm++"].from_config(base.scheduler.config)
    pipeline.register_modules(scheduler=scheduler)
    pictures = {0.0: None, 1.0: None}
    for scale in pictures:
        if scale:
            pipeline.load_lora_weights(weights / "pytorch_lora_weights.safetensors")
        seeded = torch.Generator().manual_seed(7)
        made = pipeline("mega man, red", negative_prompt="blurry", generator=seeded, **settings)
        pictures[scale] = np.asarray(made.images[0]).astype(int)
    for scale, picture in pictures.items():
        assert np.abs(picture - np.asarray(drawn[scale])).max() <= 3, scale  # the file is float16
    assert np.abs(pictures[0.0] - pictures[1.0]).max() > 10


@of_kinds
def test_all_samplers_of_a_base_whose_schedule_ends_in_noise_begin_there(
    tiny_folders: FolderOf, kind: Kind, tmp_path: Path
) -> None:
    folder = tmp_path / "zero"
    pipeline = DiffusionPipeline.from_pretrained(tiny_folders(kind))
    config = dict(pipeline.scheduler.config) | {"prediction_type": "v_prediction"}
    pipeline.register_modules(
        scheduler=type(pipeline.scheduler).from_config(config, rescale_betas_zero_snr=True)
    )
    pipeline.save_pretrained(folder)
    base = base_of(folder)
    assert (base.prediction_type, base.has_zero_snr) == ("v_prediction", True)
    for name in generate_megaman.drawing.SAMPLERS:
        drawing = generate_megaman.drawing.pipeline_of(base, name)
        drawing.scheduler.set_timesteps(5)
        assert round(float(drawing.scheduler.timesteps[0])) == 999, name
    generators = [torch.Generator().manual_seed(1)]
    texts = generate_megaman.drawing.words(base, ["a"], [""])
    calls = []
    drawing = generate_megaman.drawing.pipeline_of(base, "euler")
    honest = type(drawing).__call__

    def watched(self: object, **settings: object) -> object:
        calls.append(settings.get("guidance_rescale"))
        return honest(self, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(drawing), "__call__", watched)
        made = generate_megaman.drawing.draw(
            base, drawing, width=32, height=32, generators=generators, num_inference_steps=2, **texts
        )
    assert (calls, len(made)) == ([0.7], 1)


@pytest.mark.parametrize("base_folder", [SD1, SD2], indirect=True, ids=lambda kind: kind.folder)
def test_min_snr_is_usual_for_noise_and_off_for_v(
    train: Callable[..., Path], base_folder: Path, plain_run: Path
) -> None:
    usual = base_of(base_folder).prediction_type == "epsilon"
    record = json.loads((plain_run / "training_config.json").read_text())
    assert record["snr_gamma"] == (5.0 if usual else 0.0)
    record = json.loads((train("--snr_gamma", "2").parent / "training_config.json").read_text())
    assert record["snr_gamma"] == 2.0  # the user's word wins


def test_the_users_word_on_the_prediction_is_trained_told_and_drawn_with(
    train: Callable[..., Path], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = weights_in(finished / "lora_weights")
    weights = train("--prediction_type", "v_prediction")
    assert any(not torch.equal(value, plain[key]) for key, value in weights_in(weights).items())
    seen = []
    honest = stable_diffusion.load_base

    def watched(name: str, **settings: object) -> StableDiffusion:
        seen.append(settings["wanted"])
        return honest(name, **settings)

    monkeypatch.setattr(stable_diffusion, "load_base", watched)
    cfg = generate_megaman.GenerateConfig(
        lora_path=str(weights), output_dir=str(tmp_path / "drawn"), prompts=["a"], num_inference_steps=1
    )
    generate_megaman.generate(cfg)
    assert seen == ["v_prediction"]


@EVERY_KIND
def test_learning_lowers_the_loss(train_flags: list[str]) -> None:
    run = megaman_lora.set_up(megaman_lora.read_config([*train_flags, "--validation_split", "0"])[0])

    def loss() -> float:
        with torch.no_grad():
            batches = [
                validation_batch(run.encoded, index, [200, 500, 800], run.captions.now) for index in range(6)
            ]
            losses = [denoising_losses(run.base.unet, batch, run.base.scheduler, 0) for batch in batches]
        return torch.cat(losses).mean().item()

    before = loss()
    for step in range(20):
        megaman_lora.forward_backward(run, run.data.sampler.batch(step), step)
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert loss() < 0.95 * before


# ---------------------------------------------------------------- sizes


def test_sizes_are_heights_first_cuts_of_the_scaled_picture_and_mirrored_with_it() -> None:
    crop = Crop(Path("a.png"), "a", Bucket(64, 32), (0.25, 0.5), whole=(300, 100))
    assert crop.sizes == (100, 300, 0, 8, 32, 64)  # scaled to 96 x 32, of which 32 px are cut off, 8 left
    mirrored = Crop(Path("a.png"), "a", Bucket(64, 32), (0.25, 0.5), True, whole=(300, 100))
    assert mirrored.sizes == (100, 300, 0, 24, 32, 64)
    tall = Crop(Path("a.png"), "a", Bucket(32, 64), (0.5, 1.0), whole=(40, 120))
    assert tall.sizes == (120, 40, 32, 0, 64, 32)
    assert fit_of((40, 120), Bucket(32, 64), (0.5, 1.0)).top == 40.0
    assert crop.key == Crop(Path("b.png"), "a", Bucket(64, 32), (0.25, 0.5)).key  # they decide no pixel


def test_sizes_of_a_whole_picture_are_those_of_diffusers_pipeline(
    tiny_folders: FolderOf, tmp_path: Path
) -> None:
    base = base_of(tiny_folders(XL))
    encoded = encode([[crop_of(tmp_path, 0.5)]], Captions([["a"]]), base, Store(None))
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_folders(XL))
    theirs = pipeline._get_add_time_ids((32, 32), (0, 0), (32, 32), torch.float32, 20)
    assert torch.equal(encoded.sizes[:1], theirs)


def test_large_sizes_survive_half_precision(tiny_folders: FolderOf, tmp_path: Path) -> None:
    base = load_base(str(tiny_folders(XL)), device=torch.device("cpu"), dtype=torch.bfloat16)
    crop = replace(crop_of(tmp_path, 0.5), whole=(1021, 1023))
    encoded = encode([[crop]], Captions([["a"]]), base, Store(None))
    assert encoded.sizes.tolist() == [[1023, 1021, 0, 0, 32, 32]]
    sizes = torch.tensor([[1023.0, 1021.0, 0.0, 3.0, 1023.0, 1021.0]])
    added = conditions(base.embed(["a"]), sizes)["added_cond_kwargs"]
    assert torch.equal(added["time_ids"], sizes)
    assert added["text_embeds"].dtype == torch.bfloat16
    assert conditions(base_of(tiny_folders(SD1)).embed(["a"]), sizes) == {}


@of_kinds
def test_a_picture_is_drawn_under_its_own_size(
    tiny_folders: FolderOf, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(tiny_folders(kind))
    told = []
    honest = base.unet.forward

    def watched(*args: object, added_cond_kwargs: dict | None = None, **kwargs: object) -> object:
        told.append(added_cond_kwargs and added_cond_kwargs["time_ids"][0].tolist())
        return honest(*args, added_cond_kwargs=added_cond_kwargs, **kwargs)

    monkeypatch.setattr(base.unet, "forward", watched)
    texts = generate_megaman.drawing.words(base, ["a"], [""])
    generators = [torch.Generator().manual_seed(1)]
    settings = {"width": 64, "height": 48, "num_inference_steps": 1, "generators": generators}
    generate_megaman.drawing.draw(base, generate_megaman.drawing.pipeline_of(base), **settings, **texts)
    assert told == [[48, 64, 0, 0, 48, 64] if kind is XL else None]


@of_kinds
def test_dropped_captions_are_the_empty_text_and_not_zeros(
    tiny_folders: FolderOf, kind: Kind, tmp_path: Path
) -> None:
    base = base_of(tiny_folders(kind))
    encoded = encode([[crop_of(tmp_path, 0.5)]], Captions([["mega man"]]), base, Store(None))
    cfg = TrainConfig(caption_dropout=1.0)
    batch = make_batch([Position(0, 0)], encoded, cfg, base.scheduler)
    empty = base.embed([""])
    assert torch.equal(batch.text.states, empty.states)
    assert empty.states.abs().max() > 0
    assert empty.pooled is None or torch.equal(batch.text.pooled, empty.pooled)


@EVERY_KIND
def test_short_and_long_captions_train_together(
    train: Callable[..., Path],
    plain_run: Path,
    folder_of_pictures: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = weights_in(plain_run / "lora_weights")
    long = ", ".join(["mega man", *["blue robot"] * 40])
    (folder_of_pictures / "megaman_0.txt").write_text(long, encoding="utf-8")
    cut = weights_in(train("--max_tokens", "75"))
    assert "1 caption longer than 75 tokens" in capsys.readouterr().err
    whole = weights_in(train())
    assert "longer than" not in capsys.readouterr().err
    assert short.keys() == cut.keys() == whole.keys()
    assert any(not torch.equal(cut[key], whole[key]) for key in cut)


# ---------------------------------------------------------------- where parts lie


@pytest.mark.parametrize("flags", [[], TEXT], ids=["unet", "and its encoders"])
@pytest.mark.parametrize("base_folder", [XL], indirect=True)
def test_only_what_has_work_to_do_lies_on_the_device(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str]
) -> None:
    placed = []
    honest = StableDiffusion.place

    def watched(self: StableDiffusion, *names: str) -> None:
        if not placed or placed[-1] != names:
            placed.append(names)
        honest(self, *names)

    monkeypatch.setattr(StableDiffusion, "place", watched)
    train(*flags, "--cache_dir", str(tmp_path / "cache"))
    texts = ("text_encoder", "text_encoder_2")
    trained = ("unet", *texts) if flags else ("unet",)
    assert placed[:4] == [texts, ("vae",), texts, trained]
    assert set(placed[4:]) == {trained, (*trained, "vae")}  # where a preview is decoded


@of_kinds
def test_on_a_crowded_card_one_part_follows_the_other_and_pictures_are_the_same(
    tiny_folders: FolderOf, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(tiny_folders(kind))
    placed, pictures = [], []
    honest = StableDiffusion.place

    def watched(self: StableDiffusion, *names: str) -> None:
        placed.append(names)
        honest(self, *names)

    monkeypatch.setattr(StableDiffusion, "place", watched)
    for is_crowded in (False, True):
        base.is_crowded = is_crowded
        base.place(*(() if is_crowded else ("vae", *base.parts)))
        texts = generate_megaman.drawing.words(base, ["a"], [""])
        settings = {"width": 32, "height": 32, "num_inference_steps": 1, **texts}
        generators = [torch.Generator().manual_seed(1)]
        pipeline = generate_megaman.drawing.pipeline_of(base)
        pictures += generate_megaman.drawing.draw(base, pipeline, generators=generators, **settings)
    everything = ("vae", *kind.parts)
    assert {frozenset(names) for names in placed[:7]} == {frozenset(everything)}
    encoders = tuple(encoder.part for encoder in kind.encoders)
    assert placed[7:] == [(), encoders, (), ("unet",), (), ("vae",), ()]
    assert np.array_equal(*map(np.asarray, pictures))
    base.place("unet")
    with base.at_work("vae"):  # as between two steps of a training
        assert base.placed == ("vae",)
    assert base.placed == ("unet",)


# ---------------------------------------------------------------- text encoders in training


@pytest.mark.parametrize("base_folder", KINDS, indirect=True, ids=lambda kind: kind.folder)
def test_every_trained_part_learns_at_its_own_rate(
    train: Callable[..., Path], base_folder: Path, plain_run: Path
) -> None:
    kind = base_of(base_folder).kind
    weights = train(*TEXT, "--lora_targets", "attention+ff", "--max_train_steps", "2")
    trained = weights_in(weights)
    assert {key.split()[0] for key in trained} == {".", *(encoder.part for encoder in kind.encoders)}
    for key, tensor in trained.items():
        assert "lora_B" not in key or tensor.abs().max() > 0, key  # no module waits for a gradient in vain
    last = steps_told(weights.parent)[-1]
    assert last["lr_text_encoder"] == pytest.approx(last["lr"] / 2)  # 5e-3 beside 1e-2
    assert "lr_text_encoder" not in steps_told(plain_run)[-1]


def test_a_stopped_encoder_stays_and_the_unet_goes_on(train: Callable[..., Path]) -> None:
    flags = (*TEXT, "--text_encoder_stop", "0.5", "--lr_scheduler", "constant", "--save_steps", "1")
    output = train(*flags).parent
    states = [
        megaman_lora.checkpoints.read_checkpoint(output / "checkpoints" / f"step-{step:06}").tensors
        for step in (2, 3, 4)
    ]
    of_text = [key for key in states[0] if key.startswith("parameter.text_encoder.")]
    of_unet = [key for key in states[0] if key.startswith("parameter.") and key not in of_text]
    assert len(of_text) == 8
    assert all(torch.equal(states[0][key], states[2][key]) for key in of_text)
    assert any(not torch.equal(states[1][key], states[2][key]) for key in of_unet)


def test_captions_are_read_anew_as_long_as_the_encoders_learn(
    tiny_base: StableDiffusion, tmp_path: Path
) -> None:
    encoded = encode([[crop_of(tmp_path, 0.5)]], Captions([["mega man"]]), tiny_base, Store(None))
    learning, resting = CaptionReader(encoded, tiny_base, 2), CaptionReader(encoded, tiny_base, 0)
    weight = next(iter(tiny_base.encoders["text_encoder"].parameters()))
    before = learning.for_step(0, [1]).states
    torch.testing.assert_close(before, encoded.text.states[[1]])
    with torch.no_grad():
        weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    assert not torch.allclose(learning.for_step(1, [1]).states, before)
    assert torch.equal(resting.for_step(1, [1]).states, encoded.text.states[[1]])
    settled = learning.for_step(2, [1]).states
    with torch.no_grad():
        weight.add_(0.1)
    assert torch.equal(learning.for_step(3, [1]).states, settled)
    assert not torch.allclose(learning.now([1]).states, settled)  # what is looked at is read at the moment


def test_the_class_is_asked_of_the_base_and_answered_by_what_is_trained(
    tiny_base: StableDiffusion, tmp_path: Path
) -> None:
    cfg = TrainConfig(preserve_weight=1.0, text_encoder_lr=1e-3)
    encoded = encode(
        [[crop_of(tmp_path, 0.5)]], Captions([["mega man"]], [["a robot"]]), tiny_base, Store(None)
    )
    megaman_lora.injection.inject(
        tiny_base.parts, cfg, SD1, lambda purpose, number: torch.Generator().manual_seed(number)
    )
    reader = CaptionReader(encoded, tiny_base, 9)

    def strayed() -> torch.Tensor:
        batch = make_batch(
            [Position(0, 0)], encoded, cfg, tiny_base.scheduler, lambda rows: reader.for_step(0, rows)
        )
        return preserving_losses(tiny_base.unet, batch, tiny_base.scheduler, 0)[1]

    assert strayed().max() < 1e-9
    for module in megaman_lora.injection.lora_modules(tiny_base.encoders["text_encoder"]).values():
        torch.nn.init.normal_(module.lora_B["default"].weight, std=0.5)
    assert strayed().min() > 1e-9


@pytest.mark.parametrize("base_folder", [SD1, XL], indirect=True, ids=lambda kind: kind.folder)
def test_a_preview_is_read_with_the_encoders_of_its_step(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    honest = megaman_lora.validation.draw_previews

    def watched(base: StableDiffusion, text: object, *rest: object) -> object:
        shown.append(text.states.clone())
        return honest(base, text, *rest)

    monkeypatch.setattr(megaman_lora.validation, "draw_previews", watched)
    train(*TEXT, "--cache_dir", str(tmp_path / "cache"))
    train("--cache_dir", str(tmp_path / "another"))  # which lacks the first one's samples of the base
    first, last, *untrained = shown
    assert not torch.equal(first, last)
    assert torch.equal(*untrained)


@pytest.mark.parametrize("base_folder", [XL], indirect=True)
def test_a_layer_that_nobody_reads_is_carried_along(train: Callable[..., Path], tmp_path: Path) -> None:
    """kohya trains the last layer of XL's first encoder too, which no gradient reaches."""
    tensors = load_file(train(*TEXT) / "megaman_lora.safetensors")
    read = [key for key in tensors if key.startswith("lora_te1_") and "_layers_1_" in key]
    assert len(read) == 12
    tensors |= {key.replace("_layers_1_", "_layers_2_"): tensors[key].clone() for key in read}
    save_file(tensors, tmp_path / "theirs.safetensors")
    trained = []
    honest = megaman_lora.begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megaman_lora, "begin", lambda run: (trained.extend(run.trainable), honest(run)))
        after = load_file(
            train(*TEXT, "--init_lora", str(tmp_path / "theirs.safetensors")) / "megaman_lora.safetensors"
        )
    assert after.keys() == tensors.keys()
    assert not any("text_encoder." in name and ".2.self_attn" in name for name in trained)
    for key in read:
        assert torch.equal(after[key.replace("_layers_1_", "_layers_2_")], tensors[key])


def test_training_goes_on_from_a_file_with_text_layers(train: Callable[..., Path], tmp_path: Path) -> None:
    weights = train(*TEXT)
    kept = weights.parent.rename(tmp_path / "first") / "lora_weights"
    again = train(*TEXT, "--init_lora", str(kept), "--learning_rate", "1e-9", "--text_encoder_lr", "1e-9")
    before, after = weights_in(kept), weights_in(again)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)


def test_a_base_that_predicts_otherwise_now_is_not_gone_on_with(
    train: Callable[..., Path], tiny_folders: FolderOf, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folders(SD1), tmp_path / "tiny_base")
    flags = ("--pretrained_model_name", str(folder))
    train(*flags, "--max_train_steps", "2")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(megaman_lora.UserError, match="what the base predicts was None, now 'v_prediction'"):
        train(*flags, "--snr_gamma", "5", "--resume_from_checkpoint", "latest")


def test_a_run_whose_long_captions_were_cut_tells_how_it_goes_on(
    train: Callable[..., Path], folder_of_pictures: Path
) -> None:
    (folder_of_pictures / "megaman_0.txt").write_text("mega man, " + "robot " * 90, encoding="utf-8")
    train("--max_tokens", "75", "--max_train_steps", "2")
    with pytest.raises(megaman_lora.UserError, match="75 tokens were read then, and 150 now; give --max_tok"):
        train("--resume_from_checkpoint", "latest")
    train("--max_tokens", "75", "--resume_from_checkpoint", "latest")


def test_a_checkpoint_from_before_encoders_could_learn_is_gone_on_with(
    train: Callable[..., Path], finished: Path
) -> None:
    unbroken = weights_in(finished / "lora_weights")
    output = train("--max_train_steps", "2").parent
    folder = output / "checkpoints" / "step-000002"
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("text_encoder_lr", "text_encoder_stop", "prediction_type", "base_weights", "max_tokens"):
        del manifest["settings"][name]
    del manifest["origins"]["chunks of 75 tokens that are read of captions"]
    manifest["settings"]["max_train_steps"] = 4
    manifest["settings"]["lr_warmup_steps"] = 0
    (folder / "manifest.json").write_text(megaman_lora.checkpoints._signed(manifest))
    weights = train("--resume_from_checkpoint", "latest")
    assert weights_in(weights).keys() == unbroken.keys()


def test_a_run_from_before_mirrored_captions_is_not_gone_on_with_where_it_learned_others(
    train: Callable[..., Path], folder_of_pictures: Path
) -> None:
    (folder_of_pictures / "megaman_0.txt").write_text("mega man, facing left", encoding="utf-8")
    output = train("--flip", "--max_train_steps", "2").parent
    folder = output / "checkpoints" / "step-000002"
    manifest = json.loads((folder / "manifest.json").read_text())
    sides = "left and right in captions of mirrored pictures"
    assert manifest["origins"].pop(sides) == "change places"
    (folder / "manifest.json").write_text(megaman_lora.checkpoints._signed(manifest))
    with pytest.raises(megaman_lora.UserError, match=r"before --flip exchanged left and right.*--init_lora"):
        train("--flip", "--resume_from_checkpoint", "latest")


# ---------------------------------------------------------------- a byte a weight


@pytest.mark.parametrize("base_folder", KINDS, indirect=True, ids=lambda kind: kind.folder)
def test_a_base_in_bytes_trains_alike_with_and_without_recomputing(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    honest = megaman_lora.begin

    def watched(run: megaman_lora.Run) -> None:
        honest(run)
        kinds = {parameter.dtype for parameter in run.base.unet.parameters()}
        adapter = {parameter.dtype for parameter in run.trainable.values()}
        seen.append((torch.int8 in kinds, adapter, run.base.unet.conv_in.weight.dtype))

    monkeypatch.setattr(megaman_lora, "begin", watched)
    flags = ("--base_weights", "int8", "--max_train_steps", "2", "--learning_rate", "1e-3")
    plain = weights_in(train(*flags))
    lean = weights_in(train(*flags, "--gradient_checkpointing"))
    full = weights_in(train(*flags[2:]))
    scale = max(value.abs().max() for key, value in plain.items() if "lora_B" in key)
    assert max((plain[key] - lean[key]).abs().max() for key in plain) < 1e-4 * scale
    assert any(not torch.equal(plain[key], full[key]) for key in plain)
    assert seen[:2] == [(True, {torch.float32}, torch.float32)] * 2
    assert seen[2][0] is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_of_bytes_compute_with_the_weights_that_these_stand_for(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.Conv2d(64, 128, 1)]
    stored = nn.ModuleList([*convolutions, nn.Linear(128, 64)]).to(dtype).requires_grad_(False)
    whole = copy.deepcopy(stored)
    int8.store_in_int8(stored)
    for layer, twin in zip(stored, whole, strict=True):
        assert layer.weight.dtype == torch.int8
        made = int8.whole(layer.weight, layer.factors, dtype)
        half_a_step = 0.5 * layer.factors.max() + twin.weight.abs().max() * torch.finfo(dtype).eps
        assert (made - twin.weight).abs().max() <= half_a_step
        twin.weight.data = made
    x = torch.randn(2, 32, 8, 8, dtype=dtype, requires_grad=True)
    results = []
    for first, second, last in (stored, whole):
        rows = second(first(x).relu()).flatten(2).transpose(1, 2)
        out = last(rows.contiguous())  # of scattered ones torch rounds before it adds the bias
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        results.append((out, gradient))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_base_in_bytes_is_off_by_a_percent_and_stays_so_in_a_resume(
    tiny_folders: FolderOf, train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "SMALLEST_LAYER", 1)
    base = base_of(tiny_folders(XL))
    rounded = copy.deepcopy(base.unet)
    int8.store_in_int8(rounded)
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    text, sizes = base.embed(["mega man"]), torch.full((1, 6), 32.0)
    with torch.no_grad():
        exact, near = (
            unet(noise, 500, text.states, **conditions(text, sizes)).sample for unet in (base.unet, rounded)
        )
    assert 0 < (exact - near).norm() / exact.norm() < 0.02
    flags = ("--base_weights", "int8", "--lr_scheduler", "constant", "--lr_warmup_steps", "0")
    unbroken = weights_in(train(*flags))
    train(*flags, "--max_train_steps", "2")
    resumed = weights_in(train(*flags, "--resume_from_checkpoint", "latest"))
    assert all(torch.equal(unbroken[key], resumed[key]) for key in unbroken)


@pytest.mark.parametrize("base_folder", [SD1, XL], indirect=True, ids=lambda kind: kind.folder)
def test_every_module_of_a_base_in_bytes_can_carry_a_lora(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "SMALLEST_LAYER", 1)
    flags = ("--lora_targets", "conv", "--max_train_steps", "2")
    full, rounded = weights_in(train(*flags)), weights_in(train(*flags, "--base_weights", "int8"))
    assert full.keys() == rounded.keys()
    assert all(rounded[key].abs().max() > 0 for key in rounded if "lora_B" in key)


def test_a_dora_wants_whole_weights(train: Callable[..., Path]) -> None:
    with pytest.raises(megaman_lora.UserError, match="--base_weights int8: a DoRA needs"):
        train("--base_weights", "int8", "--use_dora")
