"""What a base predicts is found out: from its files, from the user, from the model itself."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler
from safetensors.torch import save_file
from torch import Tensor

from megaman.common.console import Exit, UserError
from megaman.common.kinds import KINDS, SD1, SD2, XL, Kind
from megaman.model.drawing import SAMPLERS
from megaman.model.hub import EMBEDDED_FOLDER
from megaman.model.prediction import (
    TELLING_BIAS,
    Prediction,
    Stated,
    asked,
    corrected,
    decide,
    hinted_in_file,
    resolution_of,
    stated_in_file,
    stated_in_scheduler,
)
from megaman.model.stable_diffusion import load_base

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V, EPSILON = Prediction("v_prediction", zero_snr=False), Prediction("epsilon", zero_snr=False)
ZERO = Prediction("v_prediction", zero_snr=True)


def never() -> str:
    raise AssertionError("the model was asked")


def written(folder: Path, metadata: dict[str, str], *keys: str) -> Path:
    """A single file with these metadata and these tensors without numbers."""
    file = folder / "base.safetensors"
    save_file({key: torch.zeros(0) for key in ("weight", *keys)}, file, metadata)
    return file


# ---------------------------------------------------------------- what files say


@pytest.mark.parametrize(
    ("metadata", "keys", "stated"),
    [
        ({}, (), Stated()),
        ({}, ("v_pred",), Stated("v_prediction")),
        ({}, ("v_pred", "ztsnr"), Stated("v_prediction", zero_snr=True)),
        ({}, ("ztsnr",), Stated(None, zero_snr=True)),
        ({"modelspec.prediction_type": "v"}, (), Stated("v_prediction")),
        ({"modelspec.prediction_type": "v_prediction"}, (), Stated("v_prediction")),
        ({"modelspec.prediction_type": "epsilon"}, (), Stated("epsilon")),
        ({"modelspec.prediction_type": ""}, (), Stated()),
        ({"modelspec.predict_key": "v"}, (), Stated("v_prediction")),
        ({"modelspec.predict_key": "epsilon"}, (), Stated("epsilon")),
        ({"modelspec.prediction_type": "V"}, ("v_pred", "ztsnr"), Stated("v_prediction", zero_snr=True)),
    ],
)
def test_a_single_file_says_what_it_predicts_by_keys_and_metadata(
    tmp_path: Path, metadata: dict[str, str], keys: tuple[str, ...], stated: Stated
) -> None:
    assert stated_in_file(written(tmp_path, metadata, *keys)) == stated


@pytest.mark.parametrize(("word", "type_"), [("v", "v_prediction"), ("eps", "epsilon")])
def test_a_configuration_beside_a_file_says_what_it_predicts(tmp_path: Path, word: str, type_: str) -> None:
    file = written(tmp_path, {})
    yaml = f'model:\n  target: x\n  params:\n    parameterization: "{word}"\n    linear_end: 0.0120\n'
    file.with_suffix(".yaml").write_text(yaml)
    assert stated_in_file(file) == Stated(type_)
    file.with_suffix(".yaml").rename(tmp_path / "another.yaml")
    assert stated_in_file(file) == Stated()


@pytest.mark.parametrize(
    "text", ["model: [", "model: !!python/object:os.x {}", "\xff", "a: 2001-99-99", "[" * 5000]
)
def test_a_damaged_configuration_is_passed_over_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    file = written(tmp_path, {"modelspec.prediction_type": "v"})
    file.with_suffix(".yaml").write_bytes(text.encode("latin-1"))
    assert stated_in_file(file) == Stated("v_prediction")
    assert "base.yaml can't be read as YAML" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "v", "model:", "model: {params: [v]}", "model: {params: {parameterization: 1}}"]
)
def test_a_configuration_of_something_else_says_nothing(tmp_path: Path, text: str) -> None:
    file = written(tmp_path, {})
    file.with_suffix(".yaml").write_text(text)
    assert stated_in_file(file) == Stated()


def test_contradictory_words_are_refused_by_both_unless_the_user_decides(tmp_path: Path) -> None:
    file = written(tmp_path, {"modelspec.prediction_type": "epsilon"}, "v_pred")
    stated = stated_in_file(file)
    with pytest.raises(UserError) as error:
        decide(stated, "auto", never)
    assert error.value.exit_code == Exit.MODEL
    assert str(error.value) == (
        f"{file}: predicts by its metadata modelspec.prediction_type epsilon, but by its tensor v_pred "
        "v_prediction. Name the right one with --prediction_type."
    )
    assert decide(stated, "v_prediction", never) == V
    assert decide(stated, "epsilon", never) == EPSILON


def test_an_unknown_word_is_refused_unless_the_user_decides(tmp_path: Path) -> None:
    stated = stated_in_file(written(tmp_path, {"modelspec.prediction_type": "sample"}, "ztsnr"))
    with pytest.raises(
        UserError, match=r"predicts 'sample', which is not known here\. Name .*--prediction_type"
    ):
        decide(stated, "auto", never)
    assert decide(stated, "v_prediction", never) == ZERO


def test_a_folder_says_it_by_its_scheduler() -> None:
    assert stated_in_scheduler(PNDMScheduler(**BETAS).config) == EPSILON
    assert stated_in_scheduler({"beta_start": 0.00085}) == EPSILON
    assert stated_in_scheduler(EulerDiscreteScheduler(prediction_type="v_prediction").config) == V
    zero = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert stated_in_scheduler(zero.config) == ZERO
    for word in ("sample", None, "flow"):
        with pytest.raises(
            UserError, match=r"prediction_type is .*; bases are trained that predict"
        ) as error:
            stated_in_scheduler({"prediction_type": word})
        assert error.value.exit_code == Exit.MODEL


# ---------------------------------------------------------------- what the model says


def ideal(type_: str, scheduler: DDPMScheduler, picture: Tensor) -> Callable[..., SimpleNamespace]:
    """A UNet that knows but this picture (1,4,h,w), and predicts without a fault."""

    def unet(noisy: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> SimpleNamespace:
        assert encoder_hidden_states.shape == (1, 77, 8)
        alpha_bar = scheduler.alphas_cumprod[timestep.long()]
        own = picture[..., : noisy.shape[2], : noisy.shape[3]]
        noise = (noisy - alpha_bar.sqrt() * own) / (1 - alpha_bar).sqrt()
        velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * own
        return SimpleNamespace(sample=noise if type_ == "epsilon" else velocity)

    return unet


TEXT = torch.zeros(1, 77, 8)
PICTURE = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("grey", [1.0, 0.3, 0.0], ids=["picture", "pale", "grey"])
@pytest.mark.parametrize("type_", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("has_zero_snr", [False, True])
def test_an_ideal_model_is_told_by_asking(type_: str, has_zero_snr: bool, grey: float) -> None:
    scheduler = DDPMScheduler(**BETAS, rescale_betas_zero_snr=has_zero_snr)
    assert asked(ideal(type_, scheduler, grey * PICTURE), TEXT, scheduler) == type_


def test_a_model_is_asked_once_in_its_precision_with_pure_noise_at_the_last_timestep() -> None:
    seen = []

    def unet(noisy: Tensor, timestep: Tensor, **more: object) -> SimpleNamespace:
        seen.append((noisy, timestep.item(), more, torch.is_grad_enabled()))
        return SimpleNamespace(sample=noisy)

    unet.config = SimpleNamespace(in_channels=5)
    further = {"added_cond_kwargs": {"time_ids": torch.zeros(1, 6)}}
    scheduler = DDPMScheduler(num_train_timesteps=500)
    for _ in range(2):
        assert asked(unet, TEXT.bfloat16(), scheduler, further) == "epsilon"
    (noise, timestep, more, has_grad), (again, *_) = seen
    assert (noise.shape, noise.dtype, timestep, has_grad) == ((1, 5, 32, 32), torch.bfloat16, 499, False)
    assert more["added_cond_kwargs"] is further["added_cond_kwargs"]
    assert torch.equal(noise, again)
    assert abs(noise.std().item() - 1) < 0.05


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_answer_that_is_not_finite_is_none(value: float) -> None:
    scheduler = DDPMScheduler()
    unet = ideal("epsilon", scheduler, torch.full((1, 4, 32, 32), value))
    assert asked(unet, TEXT, scheduler) is None
    assert decide(Stated(), "auto", lambda: None) == EPSILON


def test_the_embedded_base_predicts_epsilon_by_its_own_word() -> None:
    base = load_base(str(EMBEDDED_FOLDER), device=torch.device("cpu"), dtype=torch.float32)
    text = base.embed([""])
    assert asked(base.unet, getattr(text, "states", text), base.scheduler) == "epsilon"


# ---------------------------------------------------------------- what follows


def test_the_users_word_wins_then_the_files_then_the_models() -> None:
    assert decide(EPSILON, "v_prediction", never) == V
    assert decide(V, "epsilon", never) == EPSILON
    assert decide(ZERO, "v_prediction", never) == ZERO
    assert decide(Stated("v_prediction"), "auto", never) == V
    assert decide(ZERO, "auto", never) == ZERO
    assert decide(Stated(), "auto", lambda: "v_prediction") == V
    assert decide(Stated(), "auto", lambda: "epsilon") == EPSILON
    assert decide(Stated(zero_snr=True), "auto", lambda: "v_prediction") == ZERO


@pytest.mark.parametrize(
    ("stated", "wanted", "way_out"),
    [
        (ZERO, "epsilon", "Leave out --prediction_type epsilon"),
        (Prediction("epsilon", zero_snr=True), "auto", "Name --prediction_type v_prediction"),
        (Stated("epsilon", zero_snr=True), "auto", "Name --prediction_type v_prediction"),
        (Stated(zero_snr=True), "auto", "Name --prediction_type v_prediction"),
    ],
)
def test_epsilon_on_a_schedule_that_ends_in_noise_alone_is_refused(
    stated: Stated | Prediction, wanted: str, way_out: str
) -> None:
    with pytest.raises(UserError, match=way_out) as error:
        decide(stated, wanted, lambda: "epsilon")
    assert error.value.exit_code == Exit.MODEL


def test_a_base_that_predicts_epsilon_keeps_its_schedule() -> None:
    for kind in KINDS:
        config = PNDMScheduler.load_config(kind.config / "scheduler")
        before, after = DDPMScheduler.from_config(config), corrected(config, EPSILON)
        assert after.config.keys() == before.config.keys()
        assert all(after.config[key] == before.config[key] for key in after.config if key[0] != "_")
        assert torch.equal(after.alphas_cumprod, before.alphas_cumprod)
        for sampler in SAMPLERS.values():
            ours, theirs = sampler.from_config(after.config), sampler.from_config(before.config)
            ours.set_timesteps(20)
            theirs.set_timesteps(20)
            assert torch.equal(ours.timesteps, theirs.timesteps)
            assert torch.equal(getattr(ours, "sigmas", ours.betas), getattr(theirs, "sigmas", theirs.betas))


def test_v_prediction_is_carried_into_every_schedule() -> None:
    scheduler = corrected(PNDMScheduler(**BETAS).config, V)
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.timestep_spacing == PNDMScheduler().config.timestep_spacing
    assert scheduler.alphas_cumprod[-1] > 0
    for sampler in SAMPLERS.values():
        assert sampler.from_config(scheduler.config).config.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_zero_snr_base_is_drawn_with_from_pure_noise_to_its_picture(name: str) -> None:
    """With an ideal v model, by every sampler; XL's own configuration would begin at 951."""
    scheduler = corrected(EulerDiscreteScheduler(**BETAS, timestep_spacing="leading").config, ZERO)
    assert scheduler.alphas_cumprod[-1] == 0
    assert scheduler.config.timestep_spacing == "trailing"
    sampler = SAMPLERS[name].from_config(scheduler.config)
    sampler.set_timesteps(20)
    assert sampler.timesteps[0] == 999
    unet = ideal("v_prediction", scheduler, PICTURE)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(PICTURE.shape, generator=generator) * sampler.init_noise_sigma
    extra = {"generator": generator} if name in ("euler_a", "ddim") else {}
    for timestep in sampler.timesteps:
        seen = sampler.scale_model_input(latents, timestep)
        answer = unet(seen, timestep, encoder_hidden_states=TEXT).sample
        latents = sampler.step(answer, timestep, latents, **extra).prev_sample
    assert torch.allclose(latents, PICTURE, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "epsilon", "v"), [(SD1, 512, 512), (SD2, 512, 768), (XL, 1024, 1024)], ids=["sd1", "sd2", "xl"]
)
def test_bases_that_predict_v_may_be_of_another_resolution(kind: Kind, epsilon: int, v: int) -> None:
    assert resolution_of(kind, EPSILON) == resolution_of(kind, Stated()) == epsilon
    assert resolution_of(kind, V) == resolution_of(kind, Stated("v_prediction")) == v


@pytest.mark.parametrize(("shift", "side"), [(0.0, 512), (0.2, 768)])
def test_a_silent_file_of_2_is_trained_at_the_size_that_its_norm_hints_at(
    tmp_path: Path, shift: float, side: int
) -> None:
    bias = shift * torch.tensor([1.0, -1.0, 1.0, -1.0])
    save_file({TELLING_BIAS: bias}, tmp_path / "a.safetensors")
    hinted = hinted_in_file(tmp_path / "a.safetensors", Stated())
    assert resolution_of(SD2, hinted) == side
    assert resolution_of(SD1, hinted) == 512
    assert hinted_in_file(tmp_path / "a.safetensors", Stated("epsilon")) == Stated("epsilon")
