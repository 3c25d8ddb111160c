"""The frozen Stable Diffusion under the adapter: where it comes from, what it is made of. Knows diffusers."""

import contextlib
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from megaman.common.console import Exit, UserError, say
from megaman.common.kinds import SD1, SD2, UNET, XL, Kind, kind_of_width
from megaman.config.train import EMBEDDED, PredictionType
from megaman.model import prediction
from megaman.model.detection import OTHER_INPUTS, OTHER_WIDTHS, other_parts, other_pipeline
from megaman.model.hub import (
    BASE_FLAG,
    EMBEDDED_FOLDER,
    MOVED,
    NO_SAFETENSORS,
    VARIANT,
    canonical_name,
    check_folder_or_file,
    hub_id_of,
    is_local,
    is_variant_alone,
    local_file,
    small_json,
    why_not_loaded,
)
from megaman.model.prediction import Prediction
from megaman.model.single_file import kind_in, load_file
from megaman.model.text import Text, ids_of, read, weighted, weighted_ids_of, widths_of
from megaman.model.tokenizer import clip_tokenizer
from megaman.model.weights import Origin


@dataclass
class StableDiffusion:
    """A Stable Diffusion's parts. Sizes are asked from the parts' configs, never assumed."""

    name: str  # a hub id, or the name of a folder or file without its path
    kind: Kind
    unet: UNet2DConditionModel
    vae: AutoencoderKL  # always float32: half precision overflows in some VAEs
    encoders: dict[str, nn.Module]  # of text, by the names of kind.encoders
    tokenizer: CLIPTokenizer  # one for all encoders
    scheduler: DDPMScheduler
    device: torch.device  # where it computes; parts that are not needed there lie on the CPU
    origin: Origin | None = None  # the files of its weights
    max_chunks: int = 1  # of 75 tokens, that are read of a text
    reads_weights: bool = False  # A1111's (word:1.3) and [word] in texts
    is_crowded: bool = False  # whether the device holds hardly more than one part at a time
    is_roomy: bool = False  # whether its freed memory may stay as each part had it
    placed: tuple[str, ...] = ()  # the parts that lie on the device

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Those that an adapter can change, by name."""
        return {UNET: self.unet, **self.encoders}

    @property
    def stride(self) -> int:
        """Pixels a latent cell: 8 for Stable Diffusion 1.5."""
        return _halvings(self.vae.config)

    @property
    def cell_px(self) -> int:
        """The sides of training sizes are multiples of it: the UNet halves the latents so often."""
        return _cell_px(self.unet.config, self.vae.config)

    def nearest_px(self, side: int) -> int:
        """The side nearest to this one that can be drawn: the UNet pads what it can't halve evenly, so every
        multiple of the stride.
        """
        return max(1, round(side / self.stride)) * self.stride

    @property
    def digest(self) -> str:
        """A fingerprint of the base: of three layers that any finetune changes and our LoRAs never touch."""
        total = hashlib.sha256()
        for weight in (self.unet.conv_in.weight, self.unet.conv_out.weight, self.vae.decoder.conv_in.weight):
            total.update(weight.detach().to("cpu").half().contiguous().numpy().tobytes())
        return total.hexdigest()[:12]

    @property
    def native_resolution(self) -> int:
        """The side in pixels that the UNet was trained for."""
        return self.unet.config.sample_size * self.stride

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: epsilon (the noise) or v_prediction."""
        return self.scheduler.config.prediction_type

    @property
    def has_zero_snr(self) -> bool:
        """Whether its schedule ends in noise alone (zero terminal signal-to-noise ratio)."""
        return bool(self.scheduler.config.get("rescale_betas_zero_snr"))

    @property
    def origins(self) -> dict[str, Any]:
        """What a resume must find unchanged; None where it is as it is with most bases."""
        zero = " on a schedule that ends in noise alone" if self.has_zero_snr else ""
        told = f"{self.prediction_type}{zero}"
        predicts = None if told == "epsilon" else told
        return {"the base model's weights": self.digest, "what the base predicts": predicts}

    def ids_of(self, texts: Sequence[str], at_least: int = 1) -> Tensor:
        """Tokens of texts, (N,C,77): each in as many chunks as the longest has, and at least so many."""
        return self._tokens_of(texts, at_least)[0]

    def _tokens_of(self, texts: Sequence[str], at_least: int) -> tuple[Tensor, Tensor | None]:
        """Tokens of texts, and what each weighs if that is read; (N,C,77) both."""
        if self.reads_weights:
            return weighted_ids_of(self.tokenizer, texts, self.max_chunks, at_least)
        return ids_of(self.tokenizer, texts, self.max_chunks, at_least), None

    def read(self, ids: Tensor) -> Text:
        """Texts as the UNet reads them, of their tokens (N,C,77), in the UNet's precision; with gradients
        where the encoders are in training.
        """
        return read(ids, self.encoders, self.kind, self.tokenizer).to(self.device, self.unet.dtype)

    @torch.no_grad()
    def embed_ids(self, ids: Tensor) -> Text:
        """As `read`, without gradients."""
        return self.read(ids)

    @torch.no_grad()
    def embed(self, texts: Sequence[str], at_least: int = 1) -> Text:
        """Texts as the UNet reads them: states (N,C*77,D); without gradients."""
        ids, weights = self._tokens_of(texts, at_least)
        text = self.read(ids)
        return text if weights is None else weighted(text, weights, widths_of(self.encoders, self.kind))

    def place(self, *names: str) -> None:
        """Moves these parts (vae, unet, text_encoder, …) to the device and all others off it: an accelerator
        never holds what has no work to do.
        """
        parts = {"vae": self.vae, **self.parts}
        for name in sorted(parts, key=lambda name: name in names):  # room is made first
            if name in self.placed and name not in names:
                parts[name].to("cpu")
                self.placed = tuple(each for each in self.placed if each != name)
            elif name in names and name not in self.placed:
                parts[name].to(self.device)  # which may have no room: then it is not noted
                self.placed = (*self.placed, name)
        self.placed = names
        if self.device.type == "cuda" and not self.is_roomy:
            torch.cuda.empty_cache()  # which waits for all that the card is at work on

    @contextlib.contextmanager
    def at_work(self, *names: str) -> Iterator[None]:
        """Inside the block these parts lie on the device: beside what lies there, or, on a device that is
        crowded, instead of it.
        """
        before = self.placed
        self.place(*(names if self.is_crowded else dict.fromkeys((*before, *names))))
        try:
            yield
        finally:
            self.place(*before)

    def drop_encoders(self) -> None:
        """Forgets the text encoders, which take no part in a training step unless they are trained."""
        self.placed = tuple(name for name in self.placed if name not in self.encoders)
        self.encoders = {}


def conditions(text: Text, sizes: Tensor) -> dict[str, Any]:
    """What a UNet is called with beside noise, timesteps and states: nothing, or, where the base's kind has a
    pooled text (B,P), that and six sizes (B,6) a picture.
    """
    if text.pooled is None:
        return {}
    return {"added_cond_kwargs": {"text_embeds": text.pooled, "time_ids": sizes}}


# ---------------------------------------------------------------- before it is loaded


@dataclass(frozen=True)
class BaseFacts:
    """What is known of a base before it is loaded."""

    kind: Kind
    cell_px: int  # see StableDiffusion
    tokenizer: CLIPTokenizer
    resolution: int  # to train at in pixels, where the user names none


def peek(name: str) -> BaseFacts:
    """What this base is, by its configuration, which the hub is asked for if it is not on this disk; Stable
    Diffusion 1.x where it can't be had. UserError (exit 4) that names what a single file is, if it is none
    of ours.
    """
    file = Path(name).expanduser()
    if is_local(name) and file.suffix == ".safetensors" and file.is_file():
        kind = kind_in(file)
        stated = prediction.hinted_in_file(file, prediction.stated_in_file(file))
        resolution = prediction.resolution_of(kind, stated)
        return BaseFacts(kind, _cell_px(*_shipped(kind)), clip_tokenizer(), resolution)
    try:
        unet, vae = (small_json(name, f"{part}/config.json") for part in ("unet", "vae"))
        kind = kind_of_config(unet)
        cell_px = _cell_px(unet, vae)
        resolution = unet["sample_size"] * _halvings(vae)
    except (OSError, ValueError, KeyError, TypeError):
        kind = SD1
        cell_px = _cell_px(*_shipped(SD1))
        resolution = SD1.resolution
    for part in ("tokenizer/vocab.json", "tokenizer/tokenizer.json"):
        with contextlib.suppress(OSError, ValueError):
            tokenizer = _own_tokenizer(CLIPTokenizer.from_pretrained(local_file(name, part).parent), kind)
            return BaseFacts(kind, cell_px, tokenizer, resolution)
    return BaseFacts(kind, cell_px, clip_tokenizer(), resolution)


def _config(folder: Path, part: str) -> dict[str, Any]:
    return json.loads((folder / part / "config.json").read_bytes())


def _shipped(kind: Kind) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configurations of a kind's UNet and VAE."""
    return _config(kind.config, "unet"), _config(kind.config, "vae")


def _halvings(config: Mapping[str, Any]) -> int:
    """How many times smaller a UNet or a VAE makes its input, along a side."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def _cell_px(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """The cell of a base with these configurations, see StableDiffusion."""
    return _halvings(unet) * _halvings(vae)


def kind_of_config(unet: Mapping[str, Any]) -> Kind:
    """The kind of a UNet with this configuration; of other widths than the kinds' own, by how it is built."""
    by_width = kind_of_width(unet["cross_attention_dim"])
    if by_width is not None:
        return by_width
    if unet.get("addition_embed_type") == "text_time":
        return XL
    return SD2 if unet.get("use_linear_projection") else SD1


def _own_tokenizer(tokenizer: CLIPTokenizer, kind: Kind) -> CLIPTokenizer:
    """The tokenizer that a base's texts are read with. One that pads with "!" takes every "!" for padding; in
    its place comes CLIP's, which has the same words.
    """
    clip = clip_tokenizer()
    pads_oddly = kind.encoders[0].pads_with is not None
    return clip if pads_oddly and len(tokenizer) == len(clip) else tokenizer


# ---------------------------------------------------------------- loading


def load_base(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    flag: str = BASE_FLAG,
    wanted: PredictionType = "auto",
) -> StableDiffusion:
    """The frozen base from the embedded folder, a diffusers folder, a single .safetensors file or the hub;
    its parts on the CPU, in their final precision (`place` moves them).

    UserError (exit 4) if it can't. flag: how the user names another. wanted: what its UNet predicts, if the
    user knows better than what is found out.
    """
    pipeline, origin = _load_pipeline(name, dtype, flag)
    _check_parts(name, pipeline)
    kind = kind_of_config(pipeline.unet.config)
    encoders = {encoder.part: getattr(pipeline, encoder.part) for encoder in kind.encoders}
    for part in (pipeline.vae, pipeline.unet, *encoders.values()):
        part.requires_grad_(False).eval().to(torch.float32 if part is pipeline.vae else dtype)
    if device.type == "cpu" and dtype == torch.bfloat16:
        pipeline.unet.to(memory_format=torch.channels_last)  # bfloat16 is several times slower without it
    base = StableDiffusion(
        name=canonical_name(name),
        kind=kind,
        unet=pipeline.unet,
        vae=pipeline.vae,
        encoders=encoders,
        tokenizer=_own_tokenizer(pipeline.tokenizer, kind),
        scheduler=DDPMScheduler.from_config(pipeline.scheduler.config),
        device=device,
        origin=origin,
    )
    base.scheduler = prediction.corrected(base.scheduler.config, _prediction_of(base, origin.source, wanted))
    return base


def _prediction_of(base: StableDiffusion, source: Path, wanted: PredictionType) -> Prediction:
    """What the base predicts: by the user's word, by its folder or file, or by asking it."""

    def ask() -> str | None:
        base.place(*base.encoders)
        text = base.embed([""])
        base.place(UNET)
        side = base.native_resolution
        sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32, device=base.device)
        return prediction.asked(base.unet, text.states, base.scheduler, conditions(text, sizes))

    of_file, of_folder = prediction.stated_in_file, prediction.stated_in_scheduler
    stated = of_file(source) if source.is_file() else of_folder(base.scheduler.config)
    return prediction.decide(stated, wanted, ask)


def _check_parts(name: str, pipeline: DiffusionPipeline) -> None:
    """UserError (exit 4) unless the parts fit each other as a Stable Diffusion's do."""
    unet, latents = pipeline.unet.config, pipeline.vae.config.latent_channels
    reason = None
    if unet.in_channels != latents:
        what = OTHER_INPUTS.get(unet.in_channels, "a UNet for other latents")
        reason = f"it is {what}: its UNet takes {unet.in_channels} channels, not {latents}"
    elif unet.cross_attention_dim in OTHER_WIDTHS:
        reason = f"it is {OTHER_WIDTHS[unet.cross_attention_dim]}, which this tool does not train"
    elif unet.addition_embed_type not in (None, "text_time"):
        reason = f"its UNet wants more than text ({unet.addition_embed_type})"
    else:
        names = [encoder.part for encoder in kind_of_config(unet).encoders]
        missing = [part for part in names if getattr(pipeline, part, None) is None]
        if missing:
            reason = f"its {missing[0]} is missing"
        elif unet.cross_attention_dim != sum(getattr(pipeline, part).config.hidden_size for part in names):
            reason = f"its UNet reads text {unet.cross_attention_dim} wide, its text encoder makes another"
    if reason is not None:
        raise UserError(f"{name}: not a Stable Diffusion 1.x, 2.x or XL: {reason}.", Exit.MODEL)


ANOTHER_BASE = "Name a Stable Diffusion 1.x, 2.x or XL: those are trained and drawn with."
LEFT_OUT: dict[str, Any] = {
    "safety_checker": None,
    "requires_safety_checker": False,
    "feature_extractor": None,
    "image_encoder": None,
    "add_watermarker": False,
}  # of a pipeline, as far as its kind knows it


def pipeline_class(kind: Kind) -> type[DiffusionPipeline]:
    """diffusers' pipeline of a kind."""
    return getattr(diffusers, kind.pipeline)


def known_to(kind: Kind, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that a kind's pipeline knows, and what it is told to do without."""
    known = inspect.signature(pipeline_class(kind).__init__).parameters
    return {name: value for name, value in (LEFT_OUT | dict(settings)).items() if name in known}


def of_kind(kind: Kind, parts: Mapping[str, Any]) -> DiffusionPipeline:
    """A kind's pipeline of these parts; those that it doesn't have are passed over."""
    return pipeline_class(kind)(**known_to(kind, parts))


def _download(name: str) -> Path:
    """The folder in the hub's cache that holds the model, fetched where it isn't there: as the fp16 variant
    if a part has no other weights in safetensors.
    """
    settings = {"use_safetensors": True, "safety_checker": None, "feature_extractor": None}
    try:
        return Path(DiffusionPipeline.download(name, **settings))
    except OSError as error:
        if NO_SAFETENSORS not in str(error):
            raise
        return Path(DiffusionPipeline.download(name, variant=VARIANT, **settings))


def _variant_parts(folder: Path) -> dict[str, nn.Module]:
    """The parts whose weights lie in the folder as the fp16 variant alone, by name. diffusers itself, asked
    for the variant, would prefer it to the full weights of other parts.
    """
    kinds = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    return {
        part: kind.from_pretrained(folder / part, variant=VARIANT, use_safetensors=True)
        for part, kind in kinds.items()
        if is_variant_alone(folder / part)
    }


def _refuse_pipeline(name: str, index: Mapping[str, Any]) -> None:
    """UserError (exit 4) that names what a base is by the pipeline in its index, if it is none of ours."""
    named = index.get("_class_name")
    if told := other_pipeline(str(named)):
        raise UserError(f"{name}: is {told} ({str(named)[:60]}). {ANOTHER_BASE}", Exit.MODEL)


def _refuse_parts(name: str, folder: Path) -> None:
    """UserError (exit 4) that names what a folder is by its parts, if it is none of ours."""
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_bytes())
    if told := other_parts(_config(folder, "unet"), scheduler, _config(folder, "vae")):
        raise UserError(f"{name}: is {told}. {ANOTHER_BASE}", Exit.MODEL)


def _load_pipeline(name: str, dtype: torch.dtype, flag: str) -> tuple[DiffusionPipeline, Origin]:
    """The parts of a base, and the folder or single file that they come from."""
    diffusers_logging.disable_progress_bar()  # of loading only: the bars of a download stay
    transformers_logging.disable_progress_bar()
    if name in MOVED:
        say(f"base: {name} was deleted from the hub; its successor {MOVED[name]} is used.")
        name = MOVED[name]
    source: Path | str = Path(name).expanduser() if is_local(name) else hub_id_of(name)
    if canonical_name(name) == EMBEDDED:
        source = EMBEDDED_FOLDER
    kind = None
    if isinstance(source, Path):
        check_folder_or_file(source, flag)
        kind = kind_in(source) if source.is_file() else None
    try:
        if isinstance(source, Path) and kind is not None:
            origin = Origin(source)
            return load_file(source, kind, dtype), origin
        with contextlib.suppress(FileNotFoundError):  # of which loading tells more
            _refuse_pipeline(name, small_json(name, "model_index.json"))
        folder = source if isinstance(source, Path) else _download(source)
        _refuse_parts(name, folder)
        kind = kind_of_config(_config(folder, "unet"))
        origin = Origin(folder)
        loaded = pipeline_class(kind).from_pretrained(
            str(folder),
            torch_dtype={"vae": torch.float32, "default": dtype},
            use_safetensors=True,  # no pickle is ever loaded
            **known_to(kind, {}),
            **_variant_parts(folder),
        )
        return loaded, origin
    except UserError:
        raise
    except Exception as error:  # diffusers, the hub, safetensors and tokenizers raise what they like
        raise UserError(why_not_loaded(name, source, error, flag=flag), Exit.MODEL) from error
