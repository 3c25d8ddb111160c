"""How long a training step takes, what it is made of and how much memory it needs: ours beside the way that
diffusers trains (A) and the way that kohya trains (B).

    python tests/bench/bench_step.py [--kind sd1|sd2|xl|embedded|tiny] [--precision bf16] [--batch 1]
        [--resolution 256] [--rounds 10] [--only ours,B] [--flags "--compile"] [--against FOLDER]

Each contestant (plain_loops.py) lives in a process of its own, so that no one's heap and settings help or
hinder another and its memory can be told, and waits while the others work: A, B, ours, A, B, ours, …
--flags adds our step with further flags of megaman_lora.py, and may be given several times ("" is our step
without any); --against adds the step of another checkout of this project, with --against_flags, else the
first of --flags. Of the embedded base ours is the demo's step, which also asks the base about a class; with
--flags "--preserve_weight 0" it does what A and B do. Three bases of XL's size need 30 GB and more: --only.

Prints medians, quartiles and ratios, the operators of the first of ours, then one JSON line.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from megaman.common.console import quiet_libraries  # noqa: E402

quiet_libraries()

import torch  # noqa: E402
from bench.operators import matmul_peak, peak_memory, profiled, step_flops  # noqa: E402
from bench.plain_loops import diffusers_loop, kohya_loop  # noqa: E402
from bench.setting import Setting, add_arguments, machine, parsed, setting_of, synchronize  # noqa: E402
from bench.turns import Answers, Contest, Deadline, Worker, ratio, serve, spread  # noqa: E402

import megaman_lora  # noqa: E402
from megaman.training import optim  # noqa: E402
from megaman.training.schedule import rates_at  # noqa: E402
from megaman_lora import Run, begin, forward_backward, read_config, set_up  # noqa: E402

PLAIN = {"A": diffusers_loop, "B": kohya_loop}
OURS, AGAINST = "ours", "against"
ROWS = 15  # of the operators' table


# ---------------------------------------------------------------- a contestant
def our_step(run: Run, number: int) -> None:
    """A step as `megaman_lora.train` does it, but for telling of it. The one place that knows how."""
    number %= run.cfg.max_train_steps
    rates = rates_at(number, run.cfg)
    if not hasattr(run, "step"):  # another checkout, of before
        optim.set_learning_rates(run.optimizer, rates)
    forward_backward(run, run.data.sampler.batch(number), number)
    if hasattr(run, "step"):
        run.step.update(rates)
    else:
        run.accelerator.clip_grad_norm_(run.trainable.values(), run.cfg.max_grad_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
    run.ema.update(number)


def our_loop(argv: list[str]) -> tuple[Callable[[], None], Run]:
    """One step of ours after the other, and the run."""
    run = set_up(read_config(argv)[0])
    begin(run)
    numbers = iter(range(sys.maxsize))
    return lambda: our_step(run, next(numbers)), run


def contestant(told: dict[str, Any]) -> tuple[dict[str, Any], Answers]:
    """Sets one of them up and warms it up: its facts, and what it answers."""
    setting = Setting(**told["setting"])
    started = time.perf_counter()
    argv = setting.flags(f"{told['work']}/nothing is written here")
    run = None
    if told["way"] in PLAIN:
        step, dtype = PLAIN[told["way"]](setting, read_config(argv)[0])
    else:
        step, run = our_loop([*argv, *told["flags"].split()])
        dtype = run.base.unet.dtype
    facts = {
        "precision": str(dtype).removeprefix("torch."),
        "set_up_s": round(time.perf_counter() - started, 2),
    }
    times = []
    for _ in range(told["warm_up"]):
        started = time.perf_counter()
        step()
        synchronize()
        times.append(round(time.perf_counter() - started, 3))
    facts |= {"first_s": times[0], "threads": torch.get_num_threads()}
    facts |= {"project": Path(megaman_lora.__file__).parent.name}
    return facts, {
        "turn": partial(turn, step),
        "memory": partial(peak_memory, step),
        "profile": partial(profiled, step, ROWS),
        "speed": partial(speed, run, setting.device),
    }


def turn(step: Callable[[], None], steps: int) -> float:
    """Seconds a step, over so many; a card is waited for at the end, as a run waits for it now and then."""
    started = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    return (time.perf_counter() - started) / steps


def speed(run: Run, device: str) -> dict[str, float]:
    """What a step computes and what the machine's matrix products reach, in 10^9 operations (a second)."""
    peak = matmul_peak(device, run.base.unet.dtype)
    return {"step_gflop": round(step_flops(run) / 1e9, 1), "peak_gflops": round(peak / 1e9, 1)}


# ---------------------------------------------------------------- the contest
def starters(flags: argparse.Namespace, setting: Setting) -> dict[str, Callable[[], Worker]]:
    """How each contestant is started, by name, in their order."""
    told = {"setting": asdict(setting), "work": str(flags.work), "warm_up": flags.warm_up, "flags": ""}
    wanted = flags.flags or [""]
    settings: dict[str, dict[str, Any]] = {name: told | {"way": name} for name in PLAIN}
    settings |= {f"{OURS} {more}".strip(): told | {"way": OURS, "flags": more} for more in wanted}
    projects = dict.fromkeys(settings, ROOT)
    if flags.against is not None:
        more = wanted[0] if flags.against_flags is None else flags.against_flags
        settings[AGAINST] = told | {"way": OURS, "flags": more}
        projects[AGAINST] = flags.against.resolve()
    chosen = flags.only.split(",") if flags.only else [*PLAIN, OURS, AGAINST]
    hides = setting.device == "cpu"
    return {
        name: partial(Worker, __file__, settings[name], projects[name], hides_cards=hides)
        for name in settings
        if name.split()[0] in chosen
    }


def examine(contest: Contest, flags: argparse.Namespace) -> dict[str, Any]:
    """Memory of all; operators and operations of the first of ours."""
    found: dict[str, Any] = {"memory": {}}
    for name in [*contest.workers]:
        found["memory"][name] = contest.ask(name, "memory")
    first = next((name for name in contest.workers if name.split()[0] == OURS), None)
    if first is not None and not flags.no_profile:
        found |= {"profile": contest.ask(first, "profile"), "speed": contest.ask(first, "speed")}
    return found


def result_of(seconds: dict[str, list[float]], found: dict[str, Any], batch: int) -> dict[str, Any]:
    """Medians, ratios and the share of the machine's peak."""
    steps = {name: spread(values) for name, values in seconds.items()}
    ours = [name for name in seconds if name.split()[0] == OURS]
    others = [name for name in seconds if name not in ours] + ours[:1]
    pairs = [(one, other) for one in ours for other in others if one != other]
    result = {
        "step_s": steps,
        "images_per_s": {name: round(batch / step["median"], 3) for name, step in steps.items()},
        "ratios": {f"{one}:{other}": ratio(seconds[one], seconds[other]) for one, other in pairs},
        **found,
    }
    if found.get("speed") and ours:
        reached = found["speed"]["step_gflop"] / steps[ours[0]]["median"]
        result["share_of_peak"] = round(reached / found["speed"]["peak_gflops"], 3)
    return result


def show(result: dict[str, Any], contest: Contest) -> None:
    """The tables."""
    print(f"\n{'':34} {'s/step':>9} {'quartiles':>19} {'images/s':>9} {'peak GiB':>9} {'growth':>7}")
    for name, step in result["step_s"].items():
        held = result["memory"].get(name) or {"peak_gib": None, "growth_gib": None}
        label = f"{name} ({contest.facts[name]['precision']})"
        low, high = step["quartiles"]
        print(
            f"{label:34} {step['median']:9.4f} {f'{low:.4f}-{high:.4f}':>19} "
            f"{result['images_per_s'][name]:9.3f} {held['peak_gib']!s:>9} {held['growth_gib']!s:>7}"
        )
    for pair, value in result["ratios"].items():
        print(f"{pair}: {value}")
    for name, reason in contest.failed.items():
        print(f"{name}: failed: {reason}")
    profile = result.get("profile")
    if profile:
        print(f"\n{'operator':60} {'ms':>9} {'share':>7} {'calls':>6} {'MiB in':>9}")
        for row in profile["table"]:
            print(f"{row['name']:60} {row['ms']:9.2f} {row['share']:7.1%} {row['calls']:6} {row['mib']:9.1f}")
        counts = ("operators", "kernels", "casts", "copies")
        print(", ".join(f"{name}: {profile[name]}" for name in counts))
    if result.get("speed"):
        numbers = result["speed"]
        print(
            f"{numbers['step_gflop']} GFLOP a step; matrix products reach {numbers['peak_gflops']} GFLOP/s; "
            f"of these the step {result.get('share_of_peak', 0):.1%}"
        )


def main() -> None:
    """Runs the contest; leaves with 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, help="a turn; 1, on a card 10")
    parser.add_argument("--warm_up", type=int, default=3, help="steps that are not timed")
    parser.add_argument("--only", help="of A, B, ours and against, with commas")
    parser.add_argument("--flags", action="append", help="of megaman_lora.py, for our step")
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    parser.add_argument("--against_flags", help="of its megaman_lora.py")
    parser.add_argument("--together", action="store_true", help="start all at once, on many cores")
    parser.add_argument("--no_profile", action="store_true", help="only times and memory")
    parser.add_argument("--limit_s", type=float, help="stop after so many seconds with what there is")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    flags = parsed(parser)
    if flags.serve is not None:
        serve(contestant, flags.serve)
        return
    setting, contest = setting_of(flags), Contest(Deadline(flags.limit_s))
    steps = flags.steps or (10 if setting.device == "cuda" else 1)
    try:
        contest.start(starters(flags, setting), together=flags.together)
        seconds = contest.turns(flags.rounds, "turn", steps=steps)
        result = result_of(seconds, examine(contest, flags), setting.batch)
    finally:
        contest.close()
    show(result, contest)
    told = {"bench": "step", **setting.facts, **machine(setting.device), "warm_up": flags.warm_up}
    print(json.dumps(told | result | {"facts": contest.facts, "failed": contest.failed}))
    sys.exit(1 if contest.failed else 0)


if __name__ == "__main__":
    main()
