"""Does the LoRA learn the hero, and nothing else by accident? Losses, a judge's verdicts, and controls.

    python tests/bench/bench_learning.py [--seeds 3] [--work FOLDER] [--skip_control] [TRAINING'S OWN FLAGS]

Losses: held-out pictures of the hero and foreign figures, fixed noise, 20 fixed timesteps, plain squared
error. Verdicts: a small classifier (classifier.py, its own accuracy first) looks at what base and LoRA draw.
Controls: the base under the trigger, a LoRA with B = 0 (must equal the base to the bit), and one trained on
foreign pictures under the hero's captions in random order. Sheets of all pictures judged go to FOLDER, whose
adapters and classifier are used again. Prints a table, then one JSON line.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from megaman.common.console import quiet_libraries  # noqa: E402
from megaman.common.kinds import SD1  # noqa: E402
from megaman.config.train import PRESETS, DataFlags, read_config  # noqa: E402
from megaman.model.stable_diffusion import load_base  # noqa: E402

quiet_libraries()

import torch  # noqa: E402
from adapted import inject_lora  # noqa: E402
from bench.classifier import Classifier, judged, pixels_of, trained_classifier  # noqa: E402
from bench.obedience import (  # noqa: E402
    base_prompts,
    by,
    foreign_prompts,
    hero_prompts,
    kept,
    obedience,
    parts_seen,
    share,
)
from PIL.Image import Image  # noqa: E402
from PIL.Image import open as open_picture  # noqa: E402
from PIL.ImageOps import mirror  # noqa: E402

from megaman.common.cache import Store  # noqa: E402
from megaman.config.train import EMBEDDED  # noqa: E402
from megaman.lora.load import read_adapter  # noqa: E402
from megaman.lora.merge import MergedAdapter  # noqa: E402
from megaman.model.compute import pick_device  # noqa: E402
from megaman.model.drawing import draw, pipeline_of, words  # noqa: E402
from megaman.model.stable_diffusion import StableDiffusion  # noqa: E402
from megaman.tiny_sd.figures import (  # noqa: E402
    caption,
    contact_sheet,
    random_figure,
    random_hero,
    write_heroes,
)
from megaman.tiny_sd.sketch import draw as draw_figure  # noqa: E402
from megaman.training.encoding import Captions, EncodedDataset, encode  # noqa: E402
from megaman.training.objective import denoising_losses, validation_batch  # noqa: E402
from megaman_lora import MegaManDataset, train  # noqa: E402

HELD_OUT = ROOT / "tests" / "data" / "held_out"
STARTER = ROOT / "megaman" / "starter_images"
NEGATIVE = ""  # as the generation script draws with the embedded base
TIMESTEPS = range(25, 1000, 50)  # twenty, evenly spread
STEPS, GUIDANCE = 25, PRESETS["demo"]["validation_guidance_scale"]


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
    captions = [path.read_text().strip() for path in sorted(STARTER.glob("*.txt"))]
    random.Random(5).shuffle(captions)
    return write_foreign(folder, len(captions), captions)


def embedded_base() -> StableDiffusion:
    """The embedded base in float32."""
    return load_base(EMBEDDED, device=pick_device(), dtype=torch.float32)


def encoded_folder(folder: Path, base: StableDiffusion) -> EncodedDataset:
    """A folder's pictures and captions at 64 px."""
    settings = DataFlags(resolution=base.native_resolution)
    dataset = MegaManDataset(folder, None, settings, cell_px=base.cell_px)
    views = [dataset.crops(i) for i in range(len(dataset))]
    return encode(views, Captions([dataset.texts(i) for i in range(len(dataset))]), base, Store(None))


@torch.no_grad()
def losses(base: StableDiffusion, encoded: EncodedDataset) -> list[float]:
    """Each picture's mean squared error over the fixed timesteps and noise."""
    found = []
    for i in range(len(encoded)):
        drawn = validation_batch(encoded, i, TIMESTEPS)
        found.append(denoising_losses(base.unet, drawn, base.scheduler, snr_gamma=0).mean().item())
    return found


def trained(data: Path | None, output: Path, *flags: str) -> Path:
    """The demo preset's adapter; other data than the starter pictures if named."""
    data_flags = [] if data is None else ["--data_dir", str(data)]
    quiet = ["--report_to", "none", "--validation_steps", "100000", "--save_steps", "100000"]
    argv = ["--preset", "demo", "--output_dir", str(output), *quiet, *data_flags, *flags]
    return train(read_config(argv)[0])


def change(
    base: StableDiffusion, adapter: Path, sets: dict[str, EncodedDataset], plain: dict[str, list[float]]
) -> dict[str, float]:
    """By how much the adapter changes the mean loss of each set, in percent of the base's own; plain: those
    losses.
    """
    merged = MergedAdapter(read_adapter(adapter), base.parts, SD1)
    merged.set_scale(1.0)
    after = {name: statistics.mean(losses(base, encoded)) for name, encoded in sets.items()}
    merged.set_scale(0.0)
    return {name: round(100 * (after[name] / statistics.mean(plain[name]) - 1), 1) for name in sets}


def untrained_equals_base(base: StableDiffusion, encoded: EncodedDataset, plain: list[float]) -> bool:
    """Whether a fresh LoRA changes not one bit of the base's own losses, plain. The base is spent then."""
    inject_lora(base.unet, read_config(["--preset", "demo"])[0])
    return losses(base, encoded) == plain


# ---------------------------------------------------------------- what they draw


def drawn(base: StableDiffusion, prompts: list[str], first_seed: int) -> list[Image]:
    """An image a prompt, as the generation script draws it by default."""
    pipeline, images = pipeline_of(base), []
    for start in range(0, len(prompts), 16):
        part = prompts[start : start + 16]
        seeds = range(first_seed + start, first_seed + start + len(part))
        images += draw(
            base, pipeline, **words(base, part, [NEGATIVE] * len(part)), num_inference_steps=STEPS,
            guidance_scale=GUIDANCE, height=64, width=64,
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],
        )  # fmt: skip
    return images


def save_sheet(images: list[Image], file: Path, columns: int = 16) -> None:
    """All pictures at double size, for the eye."""
    contact_sheet([image.resize((128, 128), 0) for image in images], columns).save(file)


def base_gates(base: StableDiffusion, judge: Classifier, work: Path) -> dict[str, object]:
    """Does the base draw what it is asked for, and does it not know the hero?"""
    asked = base_prompts()
    images = drawn(base, [each.prompt for each in asked], 1000)
    save_sheet(images, work / "base.png", 20)
    verdicts = judged(judge, images)
    alone = drawn(base, [each.prompt for each in hero_prompts()], 2000)
    save_sheet(alone, work / "base_trigger.png")
    return {
        **obedience(asked, verdicts),
        "by pose": by("pose", ("pose", "facing"), asked, verdicts),
        "by background": by("background", ("kind", "body", "background", "pose", "facing"), asked, verdicts),
        "trigger draws the hero": share([verdict.kind == "hero" for verdict in judged(judge, alone)]),
    }


@dataclass(frozen=True)
class Examiner:
    """What every adapter is examined with."""

    base: StableDiffusion
    judge: Classifier
    work: Path
    foreign_by_base: float  # how often the base draws the foreign figures as asked, percent

    def verdict(self, name: str, adapter: Path) -> dict[str, object]:
        """Hero rate, parts, obedience, retention, copies and diversity of one adapter's pictures."""
        asked, others = hero_prompts(), foreign_prompts()
        merged = MergedAdapter(read_adapter(adapter), self.base.parts, SD1)
        merged.set_scale(1.0)
        heroes = drawn(self.base, [each.prompt for each in asked], 2000)
        foreign = drawn(self.base, [each.prompt for each in others], 3000)
        merged.set_scale(0.0)
        save_sheet([*heroes, *foreign], self.work / f"{name}.png")
        seen, strangers = judged(self.judge, heroes), judged(self.judge, foreign)
        told_of_all = obedience(asked, seen)
        return {
            "hero": told_of_all["kind"],
            **parts_seen(seen),
            **{what: told_of_all[what] for what in ("pose", "facing", "background")},
            "others kept": round(100 * share(kept(others, strangers)) / self.foreign_by_base, 1),
            **likeness(self.base, heroes),
            "by background": by("background", ("kind", "pose", "facing"), asked, seen),
        }


def foreign_rate(base: StableDiffusion, judge: Classifier) -> float:
    """How often the base itself draws the foreign figures as asked, percent."""
    others = foreign_prompts()
    return share(kept(others, judged(judge, drawn(base, [each.prompt for each in others], 3000))))


@torch.no_grad()
def likeness(base: StableDiffusion, images: list[Image]) -> dict[str, float]:
    """`copies`: images nearer to a training picture, as it is or mirrored, than half the held-out pictures'
    median, percent; `diversity`: their mean distance from each other over that of held-out heroes. In the
    VAE's latents.
    """
    rng = random.Random(13)
    fresh = [draw_figure(random_hero(rng)) for _ in range(len(images))]

    def latents(pictures: list[Image]) -> torch.Tensor:
        return base.vae.encode(pixels_of(pictures)).latent_dist.mean.flatten(1)

    training = [open_picture(path).convert("RGB") for path in sorted(STARTER.glob("*.png"))]
    known = latents([*training, *map(mirror, training)])
    made, held_out = latents(images), latents(fresh)
    nearest, usual = (torch.cdist(each, known).min(1).values for each in (made, held_out))
    diversity = torch.pdist(made).mean() / torch.pdist(held_out).mean()
    copies = nearest < 0.5 * usual.median()
    return {"copies": share(copies.tolist()), "diversity": round(diversity.item(), 2)}


# ---------------------------------------------------------------- the bench


def main() -> None:
    """Runs everything and prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--skip_control", action="store_true", help="for a search: only the demo itself")
    parser.add_argument("--work", type=Path, default=Path(tempfile.mkdtemp(prefix="bench_learning_")))
    flags, training = parser.parse_known_args()
    base = embedded_base()
    judge, right = trained_classifier(base, flags.work)
    print("the judge is right, percent:", {name: round(100 * part, 1) for name, part in right.items()})
    gates = base_gates(base, judge, flags.work)
    print("the base, percent:", gates)
    by_base = foreign_rate(base, judge)
    examiner = Examiner(base, judge, flags.work, by_base)
    foreign = write_foreign(flags.work / "foreign", 48, None)
    sets = {"hero, held out": encoded_folder(HELD_OUT, base), "foreign": encoded_folder(foreign, base)}
    plain = {name: losses(base, encoded) for name, encoded in sets.items()}
    runs: dict[str, Path | None] = {"demo": None}
    if not flags.skip_control:
        runs["shuffled control"] = with_shuffled_captions(flags.work / "shuffled")
    rows = []
    for seed in range(flags.seeds):
        for name, data in runs.items():
            started, label = time.monotonic(), f"{name}-{seed}".replace(" ", "-")
            adapter = flags.work / label / "lora_weights"
            if not adapter.is_dir():
                trained(data, flags.work / label, "--seed", str(seed), *training)
                (flags.work / label / "seconds").write_text(f"{time.monotonic() - started:.1f}")
            seconds = float((flags.work / label / "seconds").read_text())
            row = {"run": name, "seed": seed, "seconds": seconds}
            rows.append(row | change(base, adapter, sets, plain) | examiner.verdict(label, adapter))
            print(rows[-1], flush=True)
    same = untrained_equals_base(base, sets["hero, held out"], plain["hero, held out"])
    report = {"bench": "learning", "torch": torch.__version__, "untrained_is_base": same, "judge": right}
    print_table(rows)
    print(f"untrained LoRA equals the base to the bit: {same}\n")
    print(json.dumps(report | {"base": gates, "foreign by base": by_base, "rows": rows}))


def print_table(rows: list[dict[str, object]]) -> None:
    """The rows under their names."""
    print("\n" + " | ".join(rows[0]))
    for row in rows:
        print(" | ".join(str(value) for value in row.values()))


if __name__ == "__main__":
    main()
