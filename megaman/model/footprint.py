"""What memory a run takes on a device, told before its first step."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megaman.common.kinds import Level, StepCost, kind_of_width
from megaman.config.train import TrainConfig
from megaman.kernels import onednn
from megaman.model.memory import GIB, IN_WORDS, LARGEST_SHARE
from megaman.model.stable_diffusion import StableDiffusion

RECOMPUTED_TEXT = 0.15  # of what encoders in training keep, where everything is recomputed
BY_PEFT = 1.35  # times what our own LoRA layers keep: those of PEFT, which some forms take
OF_DORA, OF_DORA_CONVOLUTIONS = 1.8, 2.5  # the same of DoRA
IN_FLOAT32 = 1.6  # times what half precision keeps: it keeps some of it twice
BESIDE_GIB = 0.09  # workspaces of the kernels
BYTES_A_PARAMETER = 16  # of the adapter: itself, its gradient, two moments, float32


@dataclass(frozen=True)
class Estimate:
    """What training takes at its peak, in GiB, as torch counts it (the driver takes about 0.5 more)."""

    base: float  # its frozen parts that stay on the device
    adapter: float  # with gradients and the optimizer's moments
    steps: Mapping[Level, float]  # what is kept of the pictures between forward and backward, by level
    added: Mapping[Level, float]  # computing, in percent
    is_checkpointed: bool  # with --gradient_checkpointing
    in_bytes: float | None  # the same frozen parts with --base_weights int8; None if they are, or can't be

    def total(self, level: Level) -> float:
        """All together, with so much recomputed."""
        return self.base + self.adapter + BESIDE_GIB + self.steps[level]

    def level_for(self, card_gib: float | None) -> Level:
        """The cheapest level with which a card holds it; of an unknown one, and where none does, all."""
        room = 0 if card_gib is None else LARGEST_SHARE * card_gib
        return next((level for level in self.steps if self.total(level) <= room), "all")

    def line(self, card_gib: float | None, level: Level) -> str:
        """What to tell before the first step. card_gib: of the card that it runs on, if there is one."""
        total = self.total(level)
        told = (
            f"memory: about {total:.1f} GiB at the peak (computed: base {self.base:.1f}, adapter "
            f"{self.adapter:.1f}, step {self.steps[level]:.1f}{self._in_words(level)})"
        )
        ways = self._ways_to_less(level)
        if card_gib is not None and total > LARGEST_SHARE * card_gib:
            return f"{told}, which this card of {card_gib:.1f} GiB hardly holds{ways and f'; {ways}'}"
        return f"{told}{ways and f'; for a smaller card: {ways}'}"

    def _in_words(self, level: Level) -> str:
        """What is recomputed, if something is or was asked for."""
        if level == "nothing":
            return "; no activation need be recomputed" if self.is_checkpointed else ""
        return f"; {IN_WORDS[level]} recomputed, {self.added[level]:.0f} % more computing"

    def _ways_to_less(self, level: Level) -> str:
        """The flags that take less, and what then remains."""
        left = self.total(level)
        ways = []
        if level != "all":
            left = self.total("all")
            way = "all blocks recomputed" if self.is_checkpointed else "--gradient_checkpointing"
            ways.append(f"{way} ({left:.1f})")
        if self.in_bytes is not None:
            left -= self.base - self.in_bytes
            ways.append(f"--base_weights int8 ({left:.1f})")
        return ", then ".join(ways)


def levels_of(base: StableDiffusion, cfg: TrainConfig) -> list[Level]:
    """What of this base's UNet can be recomputed, from cheap to dear, each with less memory than the one
    before: all or nothing, where nobody has counted what lies between. Compiled blocks are recomputed whole.
    """
    kind = kind_of_width(base.unet.config.cross_attention_dim)
    if kind is None:
        return ["nothing", "all"]
    levels: list[Level] = []
    least = math.inf
    for level, cost in kind.steps.items():
        keeps = cost.gib(cfg.lora_targets)
        if keeps < least and not (cfg.compile and "feed-forwards" in level):
            levels.append(level)
            least = keeps
    return levels


def estimate_of(
    base: StableDiffusion, trained: Iterable[Tensor], cfg: TrainConfig, batch: int, chunks: int = 1
) -> Estimate | None:
    """The memory that a run takes with so many pictures at a time; None for a base of another shape than its
    kind's, which nobody has counted. trained: the adapter's parameters. chunks: of 75 tokens, that
    the longest caption has.
    """
    kind = kind_of_width(base.unet.config.cross_attention_dim)
    if kind is None:
        return None
    own = {id(each): each for each in trained}
    frozen = [each for part in base.parts.values() for each in part.parameters() if id(each) not in own]
    laid_out = [each for part in base.parts.values() for each in onednn.layouts_of(part)]
    adapter = sum(each.numel() for each in own.values()) * BYTES_A_PARAMETER
    examples = batch * (1 + bool(cfg.preserve_weight))
    precision = IN_FLOAT32 if base.unet.dtype == torch.float32 else 1.0
    if cfg.use_dora:
        precision *= OF_DORA_CONVOLUTIONS if cfg.lora_targets == "conv" else OF_DORA
    elif cfg.lora_dropout or cfg.compile:
        precision *= BY_PEFT
    size = (cfg.side_px / 1024) ** 2
    text = chunks * kind.text_gib if cfg.text_encoder_lr else 0.0
    costs = {level: kind.steps[level] for level in levels_of(base, cfg)}
    has_bytes = cfg.base_weights == "int8" or cfg.use_dora

    def gib(level: Level, cost: StepCost) -> float:
        kept = RECOMPUTED_TEXT * text if level == "all" else text
        return examples * precision * (size * cost.gib(cfg.lora_targets) + kept)

    return Estimate(
        base=sum(each.numel() * each.element_size() for each in (*frozen, *laid_out, *laid_out)) / GIB,
        adapter=adapter / GIB,
        steps={level: gib(level, cost) for level, cost in costs.items()},
        added={level: cost.added for level, cost in costs.items()},
        is_checkpointed=cfg.gradient_checkpointing,
        in_bytes=None if has_bytes else sum(each.numel() for each in (*frozen, *laid_out)) / GIB,
    )
