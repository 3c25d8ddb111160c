"""Does the LoRA learn the hero, and nothing else by accident? Held-out denoising loss with its controls.

    python tests/bench/bench_learning.py [--seeds 3] [--steps N] [--work FOLDER]

Twelve held-out pictures of the hero and twelve foreign figures, fixed noise, 20 fixed timesteps, plain
squared error. Controls: a LoRA
with B = 0 (must equal the base to the bit), and one trained on foreign pictures that carry the hero's
captions in random order (must
gain clearly less). Prints a table, then one JSON line.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megaman.base import load_base, pick_device, quiet_libraries  # noqa: E402

quiet_libraries()

import torch  # noqa: E402

from megaman.adapters import read_adapter  # noqa: E402
from megaman.base import EMBEDDED, BaseModel  # noqa: E402
from megaman.cache import Encoded, encode  # noqa: E402
from megaman.merge import MergedAdapter  # noqa: E402
from megaman.tiny_sd.figures import caption, random_figure, write_heroes  # noqa: E402
from megaman_lora import (  # noqa: E402
    Draw,
    MegaManDataset,
    denoising_losses,
    generator_of,
    inject_lora,
    read_config,
    train,
)

HELD_OUT = ROOT / "tests" / "data" / "held_out"
TIMESTEPS = range(25, 1000, 50)  # twenty, evenly spread


def write_foreign(folder: Path, count: int, captions: list[str] | None) -> Path:
    """Figures of the base's own world, with their own captions or with the given ones."""
    rng = random.Random(99)
    figures = [random_figure(rng) for _ in range(count)]
    write_heroes(folder, figures)  # the pictures; the captions follow
    for i, figure in enumerate(figures, 1):
        text = caption(figure, rng) if captions is None else captions[i - 1]
        (folder / f"hero_{i:02}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


def with_shuffled_captions(folder: Path) -> Path:
    """Thirty foreign pictures under the hero's thirty captions, shuffled: the control's training set."""
    captions = [
        path.read_text().strip() for path in sorted((ROOT / "megaman" / "starter_images").glob("*.txt"))
    ]
    random.Random(5).shuffle(captions)
    return write_foreign(folder, len(captions), captions)


def embedded_base() -> BaseModel:
    """The embedded base in float32."""
    return load_base(EMBEDDED, device=pick_device(), dtype=torch.float32)


def encoded_folder(folder: Path, base: BaseModel) -> Encoded:
    """A folder's pictures and captions at 64 px."""
    dataset = MegaManDataset(folder, None, resolution=base.native_resolution)
    return encode((example.pixels for example in dataset), [c.text for c in dataset.captions], base)


@torch.no_grad()
def losses(base: BaseModel, encoded: Encoded) -> list[float]:
    """Each picture's mean squared error over the fixed timesteps and noise."""
    found, device = [], encoded.means.device
    count = len(TIMESTEPS)
    for i in range(len(encoded)):
        noise = torch.randn((count, *encoded.means.shape[1:]), generator=generator_of(0, "held out", i)).to(
            device
        )
        latents = encoded.means[encoded.picture_rows[i]].expand(count, -1, -1, -1)
        text = encoded.text[encoded.text_rows[i]].expand(count, -1, -1)
        drawn = Draw(latents, noise, torch.tensor(TIMESTEPS, device=device), text)
        found.append(denoising_losses(base.unet, drawn, base.scheduler, snr_gamma=0).mean().item())
    return found


def trained(data: Path | None, output: Path, *flags: str) -> Path:
    """The demo preset's adapter; other data than the starter pictures if named."""
    data_flags = [] if data is None else ["--data_dir", str(data)]
    quiet = ["--report_to", "none", "--validation_steps", "100000", "--save_steps", "100000"]
    argv = ["--preset", "demo", "--output_dir", str(output), *quiet, *data_flags, *flags]
    return train(read_config(argv)[0])


def change(base: BaseModel, adapter: Path, sets: dict[str, Encoded]) -> dict[str, float]:
    """By how much the adapter changes the mean loss of each set, in percent of the base's."""
    plain = {name: statistics.mean(losses(base, encoded)) for name, encoded in sets.items()}
    merged = MergedAdapter(read_adapter(adapter), base.unet, base.text_encoder)
    merged.set_scale(1.0)
    after = {name: statistics.mean(losses(base, encoded)) for name, encoded in sets.items()}
    merged.set_scale(0.0)
    return {name: round(100 * (after[name] / plain[name] - 1), 1) for name in sets}


def untrained_equals_base(base: BaseModel, encoded: Encoded) -> bool:
    """Whether a fresh LoRA changes not one bit of the losses. The base is spent afterwards."""
    plain = losses(base, encoded)
    inject_lora(base.unet, read_config(["--preset", "demo"])[0])
    return losses(base, encoded) == plain


def main() -> None:
    """Runs everything and prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="instead of the demo preset's")
    parser.add_argument("--work", type=Path, default=Path(tempfile.mkdtemp(prefix="bench_learning_")))
    flags = parser.parse_args()
    steps = [] if flags.steps is None else ["--max_train_steps", str(flags.steps)]
    base = embedded_base()
    sets = {
        "hero, held out": encoded_folder(HELD_OUT, base),
        "foreign": encoded_folder(write_foreign(flags.work / "foreign", 12, None), base),
    }
    shuffled = with_shuffled_captions(flags.work / "shuffled")
    rows = []
    for seed in range(flags.seeds):
        for name, data in (("demo", None), ("shuffled control", shuffled)):
            started = time.monotonic()
            adapter = trained(
                data, flags.work / f"{name}-{seed}".replace(" ", "-"), "--seed", str(seed), *steps
            )
            seconds = round(time.monotonic() - started, 1)
            rows.append({"run": name, "seed": seed, "seconds": seconds, **change(base, adapter, sets)})
    same = untrained_equals_base(base, sets["hero, held out"])
    print(f"\n{'run':18} {'seed':>4} {'hero, held out':>15} {'foreign':>9} {'seconds':>8}")
    for row in rows:
        print(
            f"{row['run']:18} {row['seed']:4} {row['hero, held out']:14}% {row['foreign']:8}% "
            f"{row['seconds']:8}"
        )
    print(f"untrained LoRA equals the base to the bit: {same}\n")
    print(
        json.dumps({"bench": "learning", "torch": torch.__version__, "untrained_is_base": same, "rows": rows})
    )


if __name__ == "__main__":
    main()
