"""Does the demo's preset learn a character that its authors never drew? Pictures of somebody else's.

    python tests/bench/bench_concept.py TRAIN HELD_OUT --trigger "two words" [--seeds 3] [--work FOLDER]

TRAIN and HELD_OUT hold PNGs with captions that begin with the trigger; FOLDER's adapters, of just these
pictures, are used again. Losses of each held-out picture
(fixed noise, 20 fixed timesteps, plain squared error) with the adapter against the base's, and a sheet for
the eye: the held-out pictures, below them what each adapter draws for their captions. Prints a table, then
one JSON line.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench.bench_learning import drawn, embedded_base, encoded_folder, losses, save_sheet, trained  # noqa: E402
from PIL import Image  # noqa: E402

from megaman.common.kinds import SD1  # noqa: E402
from megaman.lora.load import read_adapter  # noqa: E402
from megaman.lora.merge import MergedAdapter  # noqa: E402

GAIN = 25  # percent of the held-out loss that must go


def main() -> None:
    """Trains, measures, draws, and prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--trigger", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.mkdtemp(prefix="bench_concept_")))
    flags = parser.parse_args()
    flags.work.mkdir(parents=True, exist_ok=True)
    base = embedded_base()
    encoded = encoded_folder(flags.held_out, base)
    plain = losses(base, encoded)
    files = sorted(flags.held_out.glob("*.png"))
    prompts = [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files]
    shown = [Image.open(file).convert("RGB").resize((64, 64)) for file in files]
    rows = []
    for seed in range(flags.seeds):
        run = flags.work / f"seed-{seed}"
        if not (run / "lora_weights").is_dir():
            trained(flags.train, run, "--seed", str(seed), "--trigger", flags.trigger)
        merged = MergedAdapter(read_adapter(run / "lora_weights"), base.parts, SD1)
        merged.set_scale(1.0)
        after = losses(base, encoded)
        made = drawn(base, prompts, 4000 + 100 * seed)
        merged.set_scale(0.0)
        save_sheet([*shown, *made], flags.work / f"seed-{seed}.png", len(shown))
        changes = [100 * (new / old - 1) for new, old in zip(after, plain, strict=True)]
        rows.append(
            {
                "seed": seed,
                "held-out loss": round(100 * (statistics.mean(after) / statistics.mean(plain) - 1), 1),
                f"pictures that lose {GAIN} %": f"{sum(c <= -GAIN for c in changes)} of {len(changes)}",
                "the worst": round(max(changes), 1),
            }
        )
        print(rows[-1], flush=True)
    print("\n" + " | ".join(rows[0]))
    for row in rows:
        print(" | ".join(str(value) for value in row.values()))
    print(json.dumps({"bench": "concept", "trigger": flags.trigger, "rows": rows}))


if __name__ == "__main__":
    main()
