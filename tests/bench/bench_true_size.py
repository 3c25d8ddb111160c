"""A kind's true shape with random weights: does the whole way work at 0.9 to 2.6 thousand million parameters?

    python tests/bench/bench_true_size.py [--kind sd1|sd2|xl] [--work FOLDER] [--mixed_precision bf16]

Saves a random model once (2 to 7 GB: a diffusers folder of 1.x, single files of the others), trains three
steps at 256 px through the command line with every way to the network shut, loads the adapter in diffusers'
own pipeline and counts every module. Prints what it found, then one JSON line. Needs 8 GB of memory (XL: 16)
and some minutes.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from megaman.common.console import quiet_libraries  # noqa: E402
from megaman.model.hub import EMBEDDED_FOLDER  # noqa: E402

quiet_libraries()

import torch  # noqa: E402
from bench.bench_single_file import SHUT, random_bytes  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from single_files import write_true_shape  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

from megaman.common.kinds import KINDS, SD1, Kind  # noqa: E402
from megaman.lora.load import read_adapter  # noqa: E402
from megaman.model.single_file import load_file  # noqa: E402
from megaman.model.tokenizer import clip_tokenizer  # noqa: E402

ATTENTION_MODULES = {"sd1": 128, "sd2": 128, "xl": 560}  # transformer blocks x 2 attentions x 4 projections


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


def save_random_base(kind: Kind, work: Path) -> Path:
    """A base of the kind's shape, unless it is there already."""
    if kind is SD1:
        return save_random_model(work / "random_sd15")
    file = work / f"random_{kind.folder}.safetensors"
    if not file.is_file():
        work.mkdir(parents=True, exist_ok=True)
        write_true_shape(kind, file.with_suffix(".part"), random_bytes).replace(file)
    return file


def train_three_steps(base: Path, output: Path, precision: str) -> tuple[float, float]:
    """Seconds of the whole command, and its peak memory in GiB, of which pages of the base's file are a
    part.
    """
    started = time.monotonic()
    flags = [
        *(f"--pretrained_model_name={base}", f"--output_dir={output}", f"--mixed_precision={precision}"),
        *(f"--data_dir={ROOT / 'megaman' / 'starter_images'}", "--report_to=none", "--resolution=256"),
        *("--max_train_steps=3", "--gradient_accumulation_steps=1"),
    ]
    script = f"import runpy, sys; sys.argv[1:] = {flags!r}; "
    script += f"runpy.run_path({str(ROOT / 'megaman_lora.py')!r}, run_name='__main__')"
    subprocess.run([sys.executable, "-c", SHUT + script], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return round(time.monotonic() - started, 1), round(peak, 2)


def pipeline_of(base: Path, kind: Kind) -> DiffusionPipeline:
    """diffusers' own pipeline of a base."""
    if base.is_file():
        return load_file(base, kind, torch.float16)
    return StableDiffusionPipeline.from_pretrained(base, safety_checker=None, torch_dtype=torch.float32)


def modules_loaded(pipeline: DiffusionPipeline, weights: Path) -> tuple[int, bool]:
    """How many modules diffusers' own loader has filled, and whether each holds our numbers at our
    strength.
    """
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
    parser.add_argument("--kind", choices=[*ATTENTION_MODULES], default="sd1")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench_true_size")
    parser.add_argument("--mixed_precision", default="bf16")
    flags = parser.parse_args()
    kind = next(kind for kind in KINDS if kind.folder == flags.kind)
    base, output = save_random_base(kind, flags.work), flags.work / f"output_{kind.folder}"
    seconds, peak = train_three_steps(base, output, flags.mixed_precision)
    count, exact = modules_loaded(pipeline_of(base, kind), output / "lora_weights")
    lines = [line for line in (output / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    wanted = ATTENTION_MODULES[kind.folder]
    print(
        f"diffusers loaded {count} of {wanted} modules, each equal to ours: {exact}; {seconds} s in all, "
        f"at most {peak} GiB"
    )
    result = {"bench": "true_size", "kind": kind.folder, "precision": flags.mixed_precision}
    result |= {"modules": count, "equal": exact, "seconds": seconds, "peak_gib": peak}
    print(json.dumps(result | {"metrics": json.loads(lines[-1])}))
    sys.exit(0 if exact and count == wanted else 1)


if __name__ == "__main__":
    main()
