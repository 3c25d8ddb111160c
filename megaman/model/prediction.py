"""TEMPORARY: helper's file will replace it."""

from dataclasses import dataclass

from diffusers import DDPMScheduler


@dataclass(frozen=True)
class Prediction:
    type: str
    zero_snr: bool


def stated_in_scheduler(config):
    return Prediction(config["prediction_type"], bool(config.get("rescale_betas_zero_snr")))


def stated_in_file(file):
    return Prediction("epsilon", False)


def decide(stated, wanted, ask):
    return stated if wanted == "auto" else Prediction(wanted, stated.zero_snr)


def corrected(config, p):
    more = {"timestep_spacing": "trailing"} if p.zero_snr else {}
    return DDPMScheduler.from_config(
        config, prediction_type=p.type, rescale_betas_zero_snr=p.zero_snr, **more
    )


def resolution_of(kind, p):
    return kind.resolution
