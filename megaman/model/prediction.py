"""What a base's UNet predicts, the noise or v: told by its files, by the user, or by the model when asked;
and the schedule that follows from it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from diffusers import DDPMScheduler
from safetensors import safe_open
from torch import Tensor

from megaman.common.console import Exit, UserError, say
from megaman.common.kinds import Kind
from megaman.config.train import PredictionType as Wanted

PredictionType = Literal["epsilon", "v_prediction"]

FLAG = "--prediction_type"
WORDS: dict[str, PredictionType] = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
}  # as files spell them
METADATA = ("modelspec.prediction_type", "modelspec.predict_key")
V_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"  # tensors without numbers, whose presence says it
TELLING_BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
SHIFTED = 0.09
CELLS = 32  # a side, of the noise that a model is asked with
LEAST_SHARE = 0.5  # of the noise in an answer; epsilon gives about 1 of it again, v the square root of 0.005


@dataclass(frozen=True)
class Prediction:
    """What a UNet predicts, and whether its schedule ends in noise alone (zero terminal SNR)."""

    type: PredictionType
    zero_snr: bool


@dataclass(frozen=True)
class Stated:
    """What a single file says of itself."""

    type: PredictionType | None = None  # None: nothing
    zero_snr: bool = False
    problem: str | None = None  # why its word can't be taken, where it says two things, or an unknown one


# ---------------------------------------------------------------- what is stated
def stated_in_file(file: Path) -> Stated:
    """What a safetensors file says itself: by the empty tensors v_pred and ztsnr, by its metadata, by a .yaml
    of its name beside it. Raises what safetensors raises.
    """
    with safe_open(file, framework="pt") as opened:
        keys = set(opened.keys())
        metadata = opened.metadata() or {}
    words = {f"metadata {key}": metadata[key] for key in METADATA if metadata.get(key)}
    if V_KEY in keys:
        words[f"tensor {V_KEY}"] = "v"
    sidecar = file.with_suffix(".yaml")
    if word := _word_of(sidecar):
        words[sidecar.name] = word
    known = {source: WORDS.get(word.strip().lower()) for source, word in words.items()}
    zero_snr = ZERO_SNR_KEY in keys
    for source, meant in known.items():
        if meant is None:
            problem = f"{file}: by its {source} it predicts {words[source]!r}, which is not known here"
            return Stated(None, zero_snr, problem)
    if len(set(known.values())) > 1:
        both = ", but by its ".join(f"{source} {meant}" for source, meant in known.items())
        return Stated(None, zero_snr, f"{file}: predicts by its {both}")
    return Stated(next(iter(known.values()), None), zero_snr)


def hinted_in_file(file: Path, stated: Stated) -> Stated:
    """What a file states; where it states nothing, what one of its norms lets guess, which finetuning on v at
    768 px has shifted in Stable Diffusion 2.x (ComfyUI asks it too). Good enough for a default.
    """
    if stated.type is not None:
        return stated
    with safe_open(file, framework="pt") as opened:
        bias = opened.get_tensor(TELLING_BIAS) if TELLING_BIAS in opened.keys() else torch.zeros(2)  # noqa: SIM118
    is_v = bias.float().std(correction=0).item() > SHIFTED
    return Stated("v_prediction" if is_v else None, stated.zero_snr, stated.problem)


def _word_of(sidecar: Path) -> str | None:
    """The parameterization in the configuration that A1111 reads beside a model; None where it tells none."""
    if not sidecar.is_file():
        return None
    try:
        found: Any = yaml.safe_load(sidecar.read_bytes())
    except (yaml.YAMLError, OSError, ValueError, RecursionError):
        say(f"note: {sidecar} can't be read as YAML and is passed over.")
        return None
    for key in ("model", "params", "parameterization"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None


def stated_in_scheduler(config: Mapping[str, Any]) -> Prediction:
    """What the scheduler's configuration in a diffusers folder says: epsilon, where it says nothing.

    UserError (exit 4) for a type that is not trained.
    """
    word = config.get("prediction_type", "epsilon")
    for known in ("epsilon", "v_prediction"):
        if word == known:
            return Prediction(WORDS[known], bool(config.get("rescale_betas_zero_snr")))
    raise UserError(
        f"scheduler_config.json: prediction_type is {word!r}; bases are trained that predict epsilon or "
        "v_prediction. Name another base.",
        Exit.MODEL,
    )


# ---------------------------------------------------------------- what the model says
@torch.no_grad()
def asked(
    unet: Callable[..., Any],
    states: Tensor,
    scheduler: DDPMScheduler,
    further: Mapping[str, Any] | None = None,
) -> PredictionType | None:
    """What a UNet predicts, by what it makes of pure noise at the last timestep: about that noise, or
    something else. None if its answer is not finite.

    states: of an empty text, (1,L,D), in the UNet's precision and on its device. further: what else it is
    called with (added_cond_kwargs).
    """
    channels = getattr(getattr(unet, "config", None), "in_channels", 4)
    noise = torch.randn((1, channels, CELLS, CELLS), generator=torch.Generator().manual_seed(0))
    last = torch.tensor(scheduler.config.num_train_timesteps - 1, device=states.device)
    answer = unet(noise.to(states), last, encoder_hidden_states=states, **(further or {})).sample
    answer = answer.float().cpu()
    if not answer.isfinite().all():
        return None
    # Not their correlation: a v model whose average picture is grey answers with little but that noise.
    share = (answer * noise).sum().item() / noise.square().sum().item()
    return "epsilon" if share >= LEAST_SHARE else "v_prediction"


# ---------------------------------------------------------------- what follows
def decide(stated: Stated | Prediction, wanted: Wanted, ask: Callable[[], str | None]) -> Prediction:
    """What a base predicts: the user's word, else what is stated, else what the model says when asked, else
    epsilon. UserError (exit 4) where no word can be taken.
    """
    if wanted != "auto":
        found: PredictionType = wanted
    else:
        problem = getattr(stated, "problem", None)
        if problem is not None:
            raise UserError(f"{problem}. Name the right one with {FLAG}.", Exit.MODEL)
        found = stated.type or _answer(ask())
    if found == "epsilon" and stated.zero_snr:
        way_out = f"Leave out {FLAG} epsilon" if wanted == "epsilon" else f"Name {FLAG} v_prediction"
        raise UserError(
            "the base's noise schedule is said to end in noise alone (zero terminal SNR), where an epsilon "
            f"tells nothing of the picture. {way_out}, if the base was trained on v.",
            Exit.MODEL,
        )
    return Prediction(found, stated.zero_snr)


def _answer(said: str | None) -> PredictionType:
    if said is None:
        say(f"note: the base, asked what it predicts, overflows; taken for epsilon ({FLAG} says otherwise)")
    return "v_prediction" if said == "v_prediction" else "epsilon"


def corrected(config: Mapping[str, Any], prediction: Prediction) -> DDPMScheduler:
    """The training schedule of a base with this scheduler's configuration, as it predicts. Samplers made from
    it begin at the last timestep where its SNR is zero: nothing else has pure noise for its input.
    """
    spacing = {"timestep_spacing": "trailing"} if prediction.zero_snr else {}
    return DDPMScheduler.from_config(
        {"clip_sample": False} | dict(config),  # the default is for pixels, and DDIM would keep to it
        prediction_type=prediction.type,
        rescale_betas_zero_snr=prediction.zero_snr,
        **spacing,
    )


def resolution_of(kind: Kind, prediction: Stated | Prediction) -> int:
    """The side in pixels at which bases of this kind were trained that predict so."""
    return kind.v_resolution if prediction.type == "v_prediction" else kind.resolution
