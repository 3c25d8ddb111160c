"""Is the recommended checkpoint and strength a good one? Hero rates of every cell beside the recommendation.

    python tests/bench/bench_recommend.py [--seeds 3] [--work FOLDER] [--skip_overtrained] [--steps 25]
                                          [--judged 64] [--prompts N]

Two runs a seed on the embedded base: the demo with checkpoints, and an overtrained one (eight pictures, as
they are and mirrored, 3,000 steps at 1.2e-3 that never falls, nothing preserved; at three times that rate the
base is spoilt instead, and nothing is learnt by heart). Each is recommended from with generate_megaman.py
--recommend; then the judge of bench_learning.py looks at what every cell draws for its 64 prompts, which are
other ones. Prints a table (recommended cell's hero rate beside the best cell's; of the overtrained run if an
early or a weak cell is chosen, and the copies of the last checkpoint), then one JSON line. FOLDER's
adapters, pictures, classifier and verdicts are used again.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench.bench_learning import STARTER, drawn, embedded_base, trained  # noqa: E402
from bench.classifier import Classifier, judged, trained_classifier  # noqa: E402
from bench.obedience import hero_prompts, share  # noqa: E402

import generate_megaman  # noqa: E402
from megaman.common.kinds import SD1  # noqa: E402
from megaman.config.generate import read_config  # noqa: E402
from megaman.generation.candidates import Candidate, candidates_of  # noqa: E402
from megaman.lora.merge import MergedAdapter  # noqa: E402
from megaman.model.stable_diffusion import StableDiffusion  # noqa: E402

PICTURES = 8  # of the overtrained run
OVERTRAINED_STEPS = 3000
OVERTRAINED = [
    *("--max_train_steps", str(OVERTRAINED_STEPS), "--save_steps", "500", "--lr_scheduler", "constant"),
    *("--learning_rate", "1.2e-3", "--train_batch_size", "2", "--preserve_weight", "0"),
]
DEMO = ["--save_steps", "74"]  # five checkpoints and the end
LATE = 2 / 3  # of an overtrained run: from there on, at full strength, it is learnt by heart
ALLOWED = 5.0  # points of hero rate below the best cell


def few_pictures(folder: Path) -> Path:
    """Eight of the starter pictures with their captions, evenly picked."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = sorted(STARTER.glob("*.png"))
    for picture in pictures[:: len(pictures) // PICTURES][:PICTURES]:
        for file in (picture, picture.with_suffix(".txt")):
            shutil.copy(file, folder)
    return folder


def recommendation(run: Path, output: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """What recommend.json holds of a run."""
    argv = ["--recommend", f"--lora_path={run / 'lora_weights'}", f"--output_dir={output}"]
    argv += [f"--num_inference_steps={flags.steps}"]
    if flags.prompts:
        argv += ["--prompts", *(each.prompt for each in hero_prompts()[1 : 1 + flags.prompts])]
    generate_megaman.generate(read_config(argv))
    return json.loads((output / "recommend.json").read_text(encoding="utf-8"))


def hero_rate(
    base: StableDiffusion, judge: Classifier, candidate: Candidate, strength: float, count: int
) -> float:
    """How often a cell draws the hero, of so many prompts, percent."""
    merged = MergedAdapter(candidate.adapter, base.parts, SD1)
    merged.set_scale(strength)
    try:
        prompts = [each.prompt for each in hero_prompts()[:count]]
        verdicts = judged(judge, drawn(base, prompts, 2000))
    finally:
        merged.set_scale(0)
    return share([verdict.kind == "hero" for verdict in verdicts])


def rates_of(
    run: Path, rows: list[dict[str, Any]], base: StableDiffusion, judge: Classifier, count: int
) -> dict[str, float]:
    """The hero rate of every cell, `adapter@strength`; kept beside the run."""
    file = run.parent / f"{run.name}.rates-{count}.json"
    rates: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    weights = run / "lora_weights"
    candidates = {each.name: each for each in candidates_of(str(weights), weights, with_checkpoints=True)}
    for row in rows:
        name = f"{row['adapter']}@{row['strength']:g}"
        if row["strength"] and name not in rates:
            rates[name] = hero_rate(base, judge, candidates[row["adapter"]], row["strength"], count)
            file.write_text(json.dumps(rates))
    return rates


def row_of(kind: str, seed: int, found: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
    """A line of the table."""
    rows = [row for row in found["rows"] if row["strength"]]
    chosen, last = rows[0], max(row["step"] for row in rows)
    name = f"{chosen['adapter']}@{chosen['strength']:g}"
    best = max(rates, key=lambda each: rates[each])
    full = next(row for row in rows if row["step"] == last and row["strength"] == 1)
    is_late = kind == "overtrained" and chosen["step"] > LATE * last and chosen["strength"] >= 1
    return {
        "run": kind,
        "seed": seed,
        "recommended": f"{chosen['step']}@{chosen['strength']:g}",
        "hero": rates[name],
        "best": best,
        "best hero": rates[best],
        "points below": round(rates[best] - rates[name], 1),
        "early or weak": not is_late,
        "copies of it": round(100 * (chosen["measures"]["copies"] or 0), 1),
        "copies of the last": round(100 * (full["measures"]["copies"] or 0), 1),
        "hero of the last": rates[f"{full['adapter']}@1"],
    }


def main() -> None:
    """Runs everything and prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.mkdtemp(prefix="bench_recommend_")))
    parser.add_argument("--skip_overtrained", action="store_true")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps of what is recommended by")
    parser.add_argument("--judged", type=int, default=64, help="pictures a cell for the judge, at most 64")
    parser.add_argument(
        "--prompts", type=int, default=0, help="prompts to recommend by; 0: the built-in ones"
    )
    flags = parser.parse_args()
    base = embedded_base()
    judge, right = trained_classifier(base, flags.work)
    kinds: dict[str, tuple[Path | None, list[str]]] = {"demo": (None, DEMO)}
    if not flags.skip_overtrained:
        kinds["overtrained"] = (few_pictures(flags.work / "eight"), OVERTRAINED)
    table, details = [], []
    for seed in range(flags.seeds):
        for kind, (data, training) in kinds.items():
            run = flags.work / f"{kind}-{seed}"
            if not (run / "lora_weights").is_dir():
                trained(data, run, "--seed", str(seed), *training)
            drawings = flags.work / f"{kind}-{seed}-{flags.steps}-{flags.prompts}"
            found = recommendation(run, drawings, flags)
            rates = rates_of(run, found["rows"], base, judge, flags.judged)
            table.append(row_of(kind, seed, found, rates))
            print(table[-1], flush=True)
            told = ("adapter", "step", "strength", "score", "measures")
            cells = [{key: row[key] for key in told} for row in found["rows"]]
            details.append({"run": kind, "seed": seed, "cells": cells, "rates": rates})
    print("\n" + " | ".join(table[0]))
    for row in table:
        print(" | ".join(str(value) for value in row.values()))
    near = all(row["points below"] <= ALLOWED for row in table if row["run"] == "demo")
    never = all(row["early or weak"] for row in table)
    print(f"\nthe demo's recommended cell within {ALLOWED:g} points of the best: {near}")
    print(f"never an overtrained one: {never}\n")
    print(json.dumps({"bench": "recommend", "judge": right, "rows": table, "details": details}))


if __name__ == "__main__":
    main()
