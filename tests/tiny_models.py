"""Tiny random models of diffusers' own classes, one of each kind of Stable Diffusion: 32 px, steps of
milliseconds, built as the kinds are (linear projections, two encoders, sizes, v prediction).
"""

import copy
from functools import partial
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from megaman.common.kinds import SD1, SD2, XL, Kind
from megaman.model.hub import EMBEDDED_FOLDER

WIDTHS = {SD1.name: 24, SD2.name: 28, XL.name: 12 + 20}  # of the text that their UNets read
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def text_encoder(
    tokenizer: CLIPTokenizer, width: int, layers: int, act: str, *, projects: bool = False
) -> CLIPTextModel:
    """A text encoder; projects: with a vector of the whole text."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        hidden_act=act,
        projection_dim=width,
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
    )
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)


def vae(scaling_factor: float) -> AutoencoderKL:
    """A VAE of stride 2."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=scaling_factor,
    )


def sd1_pipeline(tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """As 1.x is built."""
    torch.manual_seed(0)
    own_vae = vae(0.5)
    encoder = text_encoder(tokenizer, WIDTHS[SD1.name], 1, "quick_gelu")
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTHS[SD1.name],
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return StableDiffusionPipeline(
        vae=own_vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDPMScheduler(**BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def padding_oddly(tokenizer: CLIPTokenizer) -> CLIPTokenizer:
    """A copy that pads with "!", as those that come with OpenCLIP's encoders."""
    other = copy.deepcopy(tokenizer)
    other.pad_token = "!"
    return other


def sd2_pipeline(tokenizer: CLIPTokenizer, prediction: str = "v_prediction") -> StableDiffusionPipeline:
    """As 2.x is built: linear projections, heads by block, an OpenCLIP text encoder."""
    tokenizer = padding_oddly(tokenizer)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTHS[SD2.name],
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        norm_num_groups=4,
    )
    return StableDiffusionPipeline(
        vae=vae(0.5),
        text_encoder=text_encoder(tokenizer, WIDTHS[SD2.name], 2, "gelu"),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDPMScheduler(**BETAS, prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def xl_pipeline(tokenizer: CLIPTokenizer, blocks: int = 3) -> StableDiffusionXLPipeline:
    """As XL is built: blocks of growing depth, two text encoders, a pooled vector, six sizes. With two blocks
    of its three a step takes half as long.
    """
    torch.manual_seed(0)
    first = text_encoder(tokenizer, 12, 3, "quick_gelu")
    second = text_encoder(tokenizer, 20, 3, "gelu", projects=True)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16, 16)[:blocks],
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")[:blocks],
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")[-blocks:],
        transformer_layers_per_block=[1, 1, 2][:blocks],
        attention_head_dim=[2, 4, 4][:blocks],
        use_linear_projection=True,
        cross_attention_dim=WIDTHS[XL.name],
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
        norm_num_groups=4,
    )
    return StableDiffusionXLPipeline(
        vae=vae(0.5),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=padding_oddly(tokenizer),  # ours reads with the first
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def save_tiny(kind: Kind, folder: Path, tokenizer: CLIPTokenizer | None = None, *, blocks: int = 3) -> Path:
    """Writes the diffusers folder of a tiny model of this kind. tokenizer: the embedded base's, if none is
    given. blocks: of XL's UNet.
    """
    tokenizer = tokenizer or CLIPTokenizer.from_pretrained(EMBEDDED_FOLDER / "tokenizer")
    make = {SD1: sd1_pipeline, SD2: sd2_pipeline, XL: partial(xl_pipeline, blocks=blocks)}[kind]
    make(tokenizer).save_pretrained(folder)
    return folder
