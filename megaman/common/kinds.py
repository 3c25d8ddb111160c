"""The kinds of Stable Diffusion that are trained and drawn with. Everything in which they differ stands in
this table; nothing else asks which kind a base is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

CONFIGS = Path(__file__).parents[1] / "kinds"
UNET = "unet"
CHUNK = 75  # tokens of a text that CLIP reads at a time
V_PREDICTION = "v_prediction"  # diffusers' word for it

Level = Literal[
    "nothing",
    "feed-forwards",
    "largest",
    "largest and feed-forwards",
    "two largest",
    "two largest and feed-forwards",
    "all",
]  # what of a UNet is recomputed: its blocks of the largest sizes, whole, and the others' feed-forwards


class StepCost(NamedTuple):
    """What a step of a picture of 1024 x 1024 takes in half precision, counted (bench_memory.py --count): the
    GiB that it keeps, by what is trained, with the 0.02 to 0.04 more that a card was seen to take; and the
    computing that is added, in percent.
    """

    attention: float
    linear: float  # feed-forwards and projections too
    conv: float
    added: float  # where attention is trained

    def gib(self, targets: str) -> float:
        """What is kept with these --lora_targets."""
        return {"attention": self.attention, "conv": self.conv}.get(targets, self.linear)


@dataclass(frozen=True)
class Encoder:
    """How a kind's UNet reads one of its text encoders, and what files call that."""

    part: str  # in pipelines, in an adapter's keys, in PEFT's folders
    prefix: str  # of its modules in kohya's files
    key: str  # with which its tensors' keys begin in single files; CLIP's own layout, or OpenCLIP's (model)
    layer: int  # whose states are read: -1 the last one's, normed; -2 those of the one before, as they are
    has_pooled: bool  # whether the UNet also reads the whole text as one vector
    pads_with: str | None  # the token behind a text's end; None: the end's own


@dataclass(frozen=True)
class Kind:
    """What all bases of a kind have in common."""

    name: str
    text_width: int  # of the hidden states that the UNet reads
    resolution: int  # in pixels, where nobody says another and the base does not either
    v_resolution: int  # the same, of bases that predict v
    encoders: tuple[Encoder, ...]
    has_sizes: bool  # whether the UNet is also told the picture's size and where it was cut
    has_ldm_names: bool  # of the UNet's modules in kohya's files: LDM's, or else diffusers'
    pipeline: str  # diffusers' class
    first_up_attends: bool  # whether the UNet's first block behind the middle has attentions
    folder: str  # of CONFIGS: a diffusers folder of its parts' configurations, without weights
    version: str  # ss_base_model_version, as kohya writes it
    architecture: str  # modelspec.architecture
    badge: str  # "sd version" in A1111's sidecar
    steps: Mapping[Level, StepCost] = field(hash=False)  # by what is recomputed, from cheap to dear
    text_gib: float  # that encoders in training keep of a text of 75 tokens, in half precision, counted
    implementation: str = "diffusers"  # modelspec.implementation
    of_v: tuple[str, str] | None = (
        None  # version and architecture of those that predict v, if they are others
    )

    @property
    def config(self) -> Path:
        """A diffusers folder of its parts' configurations, without weights."""
        return CONFIGS / self.folder

    @property
    def parts(self) -> tuple[str, ...]:
        """Those that an adapter can change."""
        return (UNET, *(encoder.part for encoder in self.encoders))

    def encoder(self, part: str) -> Encoder:
        """The text encoder of this name. StopIteration if the kind has none."""
        return next(encoder for encoder in self.encoders if encoder.part == part)

    def called(self, prediction: str | None) -> tuple[str, str]:
        """Version and architecture of its bases that predict this, in diffusers' words."""
        own = (self.version, self.architecture)
        return self.of_v if self.of_v is not None and prediction == V_PREDICTION else own


_CLIP_L = Encoder(
    part="text_encoder",
    prefix="lora_te",
    key="cond_stage_model.transformer.",
    layer=-1,
    has_pooled=False,
    pads_with=None,
)
_CLIP_H = replace(_CLIP_L, key="cond_stage_model.model.", pads_with="!")
_XL_CLIP_L = replace(_CLIP_L, prefix="lora_te1", key="conditioner.embedders.0.transformer.", layer=-2)
_XL_CLIP_G = Encoder(
    part="text_encoder_2",
    prefix="lora_te2",
    key="conditioner.embedders.1.model.",
    layer=-2,
    has_pooled=True,
    pads_with="!",
)

SD1 = Kind(
    name="Stable Diffusion 1.x",
    text_width=768,
    resolution=512,
    v_resolution=512,
    encoders=(_CLIP_L,),
    has_sizes=False,
    has_ldm_names=False,
    pipeline="StableDiffusionPipeline",
    first_up_attends=False,
    folder="sd1",
    version="sd_v1",
    architecture="stable-diffusion-v1",
    badge="SD1",
    steps={
        "nothing": StepCost(attention=3.09, linear=3.85, conv=4.61, added=0),
        "feed-forwards": StepCost(attention=2.18, linear=2.52, conv=3.29, added=3),
        "largest": StepCost(attention=1.96, linear=2.48, conv=2.81, added=19),
        "largest and feed-forwards": StepCost(attention=1.51, linear=1.85, conv=2.17, added=21),
        "two largest": StepCost(attention=1.27, linear=1.67, conv=1.80, added=25),
        "two largest and feed-forwards": StepCost(attention=1.11, linear=1.45, conv=1.58, added=27),
        "all": StepCost(attention=0.89, linear=1.22, conv=1.24, added=31),
    },
    text_gib=0.0225,
)
SD2 = Kind(
    name="Stable Diffusion 2.x",
    text_width=1024,
    resolution=512,
    v_resolution=768,
    encoders=(_CLIP_H,),
    has_sizes=False,
    has_ldm_names=False,
    pipeline="StableDiffusionPipeline",
    first_up_attends=False,
    folder="sd2",
    version="sd_v2",
    architecture="stable-diffusion-v2-512",
    badge="SD2",
    steps={
        "nothing": StepCost(attention=2.94, linear=3.51, conv=4.26, added=0),
        "feed-forwards": StepCost(attention=2.02, linear=2.20, conv=2.96, added=3),
        "largest": StepCost(attention=1.81, linear=2.17, conv=2.48, added=19),
        "largest and feed-forwards": StepCost(attention=1.36, linear=1.53, conv=1.85, added=21),
        "two largest": StepCost(attention=1.11, linear=1.35, conv=1.47, added=25),
        "two largest and feed-forwards": StepCost(attention=0.96, linear=1.13, conv=1.25, added=27),
        "all": StepCost(attention=0.73, linear=0.90, conv=0.91, added=31),
    },
    text_gib=0.0416,
    of_v=("sd_v2_v", "stable-diffusion-v2-768-v"),
)
XL = Kind(
    name="Stable Diffusion XL",
    text_width=2048,
    resolution=1024,
    v_resolution=1024,
    encoders=(_XL_CLIP_L, _XL_CLIP_G),
    has_sizes=True,
    has_ldm_names=True,
    pipeline="StableDiffusionXLPipeline",
    first_up_attends=True,
    folder="xl",
    version="sdxl_base_v1-0",
    architecture="stable-diffusion-xl-v1-base",
    badge="SDXL",
    steps={
        "nothing": StepCost(attention=5.29, linear=6.34, conv=7.17, added=0),
        "largest": StepCost(attention=5.08, linear=6.13, conv=6.66, added=2),
        "two largest": StepCost(attention=3.87, linear=4.67, conv=4.98, added=11),
        "feed-forwards": StepCost(attention=2.95, linear=2.99, conv=3.83, added=13),
        "largest and feed-forwards": StepCost(attention=2.74, linear=2.79, conv=3.32, added=15),
        "two largest and feed-forwards": StepCost(attention=2.11, linear=2.16, conv=2.47, added=22),
        "all": StepCost(attention=0.51, linear=0.55, conv=0.77, added=35),
    },
    text_gib=0.0922,
    implementation="https://github.com/Stability-AI/generative-models",
)
KINDS = (SD1, SD2, XL)
PARTS = tuple(dict.fromkeys(part for kind in KINDS for part in kind.parts))


def kind_of_width(text_width: int | None) -> Kind | None:
    """The kind whose UNets read text of this width; None for a relative of another size, such as the embedded
    base.
    """
    return next((kind for kind in KINDS if kind.text_width == text_width), None)
