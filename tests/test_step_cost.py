"""How many operators a step takes: what was made lean does not grow again unseen.

Counted, not timed: of a UNet built as Stable Diffusion 1.x's, in half precision, for each layer with a LoRA
and in all. A lower number is progress; then lower the bound.
"""

from counted import Cost, base_on_meta, operators_of, step_of
from tiny_models import sd1_pipeline

from megaman.common.kinds import SD1
from megaman.config.train import TrainConfig
from megaman.lora.injection import lora_modules
from megaman.model.tokenizer import clip_tokenizer

A_LAYER = {"operators": 12, "casts": 4, "copies": 0}
A_STEP = {"operators": 809, "casts": 133, "copies": 5}


def cost_of(targets: str) -> tuple[Cost, int]:
    """What a step costs, forward and backward, and how many layers have a LoRA."""
    base = base_on_meta(SD1, sd1_pipeline(clip_tokenizer()).unet)
    run, _ = step_of(base, TrainConfig(lora_targets=targets), 8)
    return operators_of(run), len(lora_modules(base.unet))


def test_a_step_takes_no_more_operators_casts_and_copies_than_it_did() -> None:
    (cost, layers), (more, with_ff) = cost_of("attention"), cost_of("attention+ff")
    assert layers == 32
    assert with_ff - layers == 8
    for name, bound in A_STEP.items():
        assert getattr(cost, name) <= bound, (name, cost)
    for name, bound in A_LAYER.items():
        assert (getattr(more, name) - getattr(cost, name)) / (with_ff - layers) <= bound, (name, more)
