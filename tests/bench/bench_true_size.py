"""Stable Diffusion 1.5's true shape with random weights: does the whole way work at 860 M parameters?

    python tests/bench/bench_true_size.py [--work FOLDER] [--mixed_precision bf16]

Saves a random model once (2 GB), trains three steps at 256 px through the command line, loads the adapter in
diffusers' own
pipeline and counts every module. Prints what it found, then one JSON line. Needs about 8 GB of memory and
some minutes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megaman.common.console import quiet_libraries  # noqa: E402
from megaman.model.hub import EMBEDDED_FOLDER  # noqa: E402

quiet_libraries()

import torch  # noqa: E402
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

from megaman.lora.load import read_adapter  # noqa: E402
from megaman.model.tokenizer import clip_tokenizer  # noqa: E402

ATTENTION_MODULES = 128  # 16 transformer blocks x 2 attentions x 4 projections


def save_random_model(folder: Path, *, whole_vocabulary: bool = False) -> Path:
    """A diffusers folder of Stable Diffusion 1.5's shape, half precision, unless it is there already.

    whole_vocabulary: CLIP's own tokenizer instead of the embedded base's.
    """
    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=CLIPTextModel(text).half(),
        tokenizer=clip_tokenizer()
        if whole_vocabulary
        else CLIPTokenizer.from_pretrained(EMBEDDED_FOLDER / "tokenizer"),
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).half(),
        scheduler=DDPMScheduler(**schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def train_three_steps(base: Path, output: Path, precision: str) -> float:
    """Seconds of the whole command."""
    started = time.monotonic()
    flags = (
        f"--resolution 256 --max_train_steps 3 --gradient_accumulation_steps 1 --mixed_precision {precision}"
    )
    paths = ["--pretrained_model_name", str(base), "--output_dir", str(output)]
    data = ["--data_dir", str(ROOT / "megaman" / "starter_images"), "--report_to", "none"]
    subprocess.run([sys.executable, str(ROOT / "megaman_lora.py"), *paths, *data, *flags.split()], check=True)
    return round(time.monotonic() - started, 1)


def modules_loaded(base: Path, weights: Path) -> tuple[int, bool]:
    """How many modules diffusers' own loader has filled, and whether each holds our numbers at our
    strength.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, torch_dtype=torch.float32)
    pipeline.load_lora_weights(weights)
    ours = read_adapter(weights / "adapter_model.safetensors").layers
    exact, count = True, 0
    for name, module in pipeline.unet.named_modules():
        if getattr(module, "lora_A", None):
            (adapter,) = module.lora_A
            count += 1
            expected = ours["unet", name].delta()
            found = module.get_delta_weight(adapter).float()
            exact &= bool((found - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-9)
    return count, exact


def main() -> None:
    """Runs everything; leaves with 1 if a module is missing or differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench_true_size")
    parser.add_argument("--mixed_precision", default="bf16")
    flags = parser.parse_args()
    base = save_random_model(flags.work / "random_sd15")
    seconds = train_three_steps(base, flags.work / "output", flags.mixed_precision)
    count, exact = modules_loaded(base, flags.work / "output" / "lora_weights")
    lines = (flags.work / "output" / "metrics.jsonl").read_text().splitlines()
    print(
        f"diffusers loaded {count} of {ATTENTION_MODULES} modules, each equal to ours: {exact}; "
        f"{seconds} s in all"
    )
    result = {"bench": "true_size", "precision": flags.mixed_precision, "modules": count, "equal": exact}
    print(json.dumps(result | {"seconds": seconds, "metrics": json.loads(lines[-1])}))
    sys.exit(0 if exact and count == ATTENTION_MODULES else 1)


if __name__ == "__main__":
    main()
