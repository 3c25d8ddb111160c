"""Do our steps compute what a plain loop computes? The losses of so many steps of both, from the same draws.

    python tests/bench/bench_same.py [--kind sd1|sd2|xl|embedded|tiny] [--steps 50] [--resolution 256]
        [--half] [--targets attention] [--seeds 1]

Ours is the step of `megaman_lora.train` with all that makes it fast. The plain loop knows nothing of this
project but the base's files: diffusers' UNet, PEFT's LoRA with the same first weights, mean squared error,
clipping, torch's AdamW; it is given the latents, noise, timesteps and text states that ours has drawn. Each
is a process of its own. With --half both train in bfloat16 too, and the plain loop does so once more with
first weights that differ in their last digit: ours may lie no farther from the plain loop in float32 than the
plain one in bfloat16 does, but for what the two plain ones lie apart (root mean square of all steps, average
of so many seeds). On the CPU. Prints tables, a verdict, then one JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from megaman.common.console import quiet_libraries  # noqa: E402

quiet_libraries()
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch  # noqa: E402
from bench.setting import Setting, add_arguments, machine, setting_of  # noqa: E402
from diffusers import DDPMScheduler, UNet2DConditionModel  # noqa: E402
from peft import LoraConfig  # noqa: E402
from torch import nn  # noqa: E402

from megaman.common.kinds import SD1, UNET  # noqa: E402
from megaman.lora.injection import targets_of  # noqa: E402
from megaman.model.hub import EMBEDDED_FOLDER  # noqa: E402
from megaman.model.stable_diffusion import conditions  # noqa: E402
from megaman.training import objective  # noqa: E402
from megaman.training.checkpoints import trained  # noqa: E402
from megaman.training.schedule import rates_at  # noqa: E402
from megaman_lora import begin, forward_backward, read_config, set_up  # noqa: E402

RATE, RANK = 1e-3, 8  # a rate at which fifty steps change something
FLOAT32 = 1e-4  # of a loss, how far ours may lie from the plain loop's
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}
NUDGED, LAST_DIGIT = "nudged", 2.0**-22  # of float32
DRAWN = "drawn-{}.pt"  # by our steps in this precision, in which the text is read too
# by name: the way, its precision, and the precision of our steps whose draws it takes
WAYS = {"ours no": ("ours", "no", "no"), "plain no": ("plain", "no", "no")}
HALF_WAYS = {
    "ours bf16": ("ours", "bf16", "bf16"),
    "true bf16": ("plain", "no", "bf16"),
    "plain bf16": ("plain", "bf16", "bf16"),
    "nudged bf16": (NUDGED, "bf16", "bf16"),
}


def our_losses(setting: Setting, work: Path, targets: str, steps: int, seed: int) -> list[float]:
    """Of so many of our steps; what they draw and begin with is written down."""
    flags = [
        *setting.flags(str(work / "nothing is written here")),
        *("--learning_rate", str(RATE), "--lr_scheduler", "constant", "--lr_warmup_steps", "0"),
        *("--lora_rank", str(RANK), "--lora_alpha", str(RANK), "--lora_targets", targets),
        *("--snr_gamma", "0", "--max_train_steps", str(steps), "--preserve_weight", "0"),
        *("--seed", str(seed)),
    ]
    run = set_up(read_config(flags)[0])
    begin(run)
    first = {name: parameter.detach().clone() for name, parameter in trained(run.base.parts).items()}
    losses, batches = [], []
    for number in range(steps):
        positions = run.data.sampler.batch(number)
        batch = objective.make_batch(positions, run.encoded, run.cfg, run.base.scheduler)
        added = conditions(batch.text, batch.sizes)
        batches.append((batch.latents, batch.noise, batch.timesteps, batch.text.states, added))
        losses.append(forward_backward(run, positions, number).mean.item())
        run.step.update(rates_at(number, run.cfg))
    drawn = {"first": first, "batches": batches, "decay": run.cfg.weight_decay}
    torch.save(drawn, work / DRAWN.format(setting.precision))
    return losses


def plain_losses(setting: Setting, path: Path, targets: str, nudge: float) -> list[float]:
    """Of the plain loop, from what ours has drawn (path). nudge: of the first weights, how much larger they
    are.
    """
    drawn: dict[str, Any] = torch.load(path, weights_only=True)
    folder = EMBEDDED_FOLDER if setting.kind == "embedded" else Path(setting.base)
    dtype = DTYPES[setting.precision]
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype)
    unet.requires_grad_(False)
    if dtype != torch.float32:
        unet.to(memory_format=torch.channels_last)  # else a CPU is several times slower
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    modules = targets_of(UNET, unet, targets, SD1)  # of a UNet the same for every kind
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=modules))
    parameters = {name: each for name, each in unet.named_parameters() if each.requires_grad}
    begin_with(parameters, {name: each * (1 + nudge) for name, each in drawn["first"].items()})
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE, weight_decay=drawn["decay"])
    losses = []
    for latents, noise, timesteps, states, added in drawn["batches"]:
        for values in added.values():
            values["text_embeds"] = values["text_embeds"].to(dtype)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            predicted = unet(noisy.to(dtype), timesteps, states.to(dtype), **added).sample
        loss = (predicted.float() - noise).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def begin_with(parameters: dict[str, nn.Parameter], first: dict[str, torch.Tensor]) -> None:
    """Gives the plain loop's LoRA, float32, the weights that ours begins with."""
    known = {plain_name(name): value for name, value in first.items()}
    if {plain_name(name) for name in parameters} != set(known):
        raise SystemExit("the two adapters have other layers")
    for name, parameter in parameters.items():
        parameter.data = known[plain_name(name)].float().clone()


def plain_name(name: str) -> str:
    """A LoRA weight's name without what each program puts into it."""
    parts = [part for part in name.split(".") if part not in ("unet", "base_model", "model", "weight")]
    return ".".join("A" if part == "lora_A" else "B" if part == "lora_B" else part for part in parts[:-1])


def apart(one: list[float], other: list[float]) -> float:
    """The largest difference of two steps' losses, of the first's."""
    return max(abs(a - b) / a for a, b in zip(one, other, strict=True))


def apart_on_average(one: list[float], other: list[float]) -> float:
    """The root mean square of the differences of all steps' losses, of the first's."""
    return mean(((a - b) / a) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5


def losses_of(seed: int, half: bool) -> dict[str, list[float]]:
    """The losses of each way in each precision, and a table of some of them."""
    losses = {}
    for name, (way, precision, drawn) in (WAYS | (HALF_WAYS if half else {})).items():
        argv = [*sys.argv, "--seed", str(seed), "--precision", precision, "--way", way, "--drawn", drawn]
        told = subprocess.run([sys.executable, *argv], stdout=subprocess.PIPE, text=True, check=True)
        losses[name] = json.loads(told.stdout.splitlines()[-1])
    for number, row in enumerate(zip(*losses.values(), strict=True)):
        if number % 7 == 0 or number == len(losses["plain no"]) - 1:
            print(f"step {number + 1:3}  " + "  ".join(f"{value:.6f}" for value in row))
    return losses


def main() -> None:
    """Runs each way in a process of its own and compares, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--targets", default="attention")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--drawn", choices=DTYPES, default="no", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=("ours", "plain", NUDGED), help=argparse.SUPPRESS)
    parser.add_argument("--half", action="store_true", help="bf16 too")
    flags = parser.parse_args()
    setting = setting_of(flags)
    work = flags.work / f"same_{setting.kind}"
    work.mkdir(parents=True, exist_ok=True)
    if flags.way == "ours":
        return print(json.dumps(our_losses(setting, work, flags.targets, flags.steps, flags.seed)))
    if flags.way is not None:
        nudge = LAST_DIGIT if flags.way == NUDGED else 0.0
        return print(
            json.dumps(plain_losses(setting, work / DRAWN.format(flags.drawn), flags.targets, nudge))
        )
    found: dict[str, list[float]] = {"ours no": []}
    for seed in range(flags.seeds):
        losses = losses_of(seed, flags.half)
        found["ours no"].append(apart(losses["plain no"], losses["ours no"]))
        half = losses.get("plain bf16")
        if half is not None:
            for name in ("ours bf16", "plain bf16"):
                found.setdefault(name, []).append(apart_on_average(losses["true bf16"], losses[name]))
            found.setdefault("two plain bf16", []).append(apart_on_average(half, losses["nudged bf16"]))
        told = {name: f"{values[-1]:.1e}" for name, values in found.items()}
        print(f"seed {seed}, away from the plain float32 loop:", told, flush=True)
    is_same = max(found["ours no"]) <= FLOAT32
    if flags.half:
        ours, plain, noise = (mean(found[name]) for name in ("ours bf16", "plain bf16", "two plain bf16"))
        is_same = is_same and ours <= plain + noise
    print(f"the same: {is_same}")
    facts = {name: value for name, value in setting.facts.items() if name != "precision"}
    print(
        json.dumps(
            {"bench": "same", "setting": facts, "steps": flags.steps, "apart": found, "same": is_same}
            | {"machine": machine(setting.device)}
        )
    )


if __name__ == "__main__":
    main()
