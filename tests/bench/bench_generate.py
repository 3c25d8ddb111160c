"""Pictures a second, by how many are drawn at a time and by sampler.

    python tests/bench/bench_generate.py [--kind sd1|sd2|xl|embedded|tiny] [--batches 1,4,8,16]
        [--samplers dpm++,euler] [--resolution 256] [--steps 25] [--rounds 5] [--against FOLDER]

Draws as generate_megaman.py does, words and decoding included; on a card four batches in a row, of which it
decodes one while it draws the next. --against has another process beside ours, from another checkout of this
project, which may be one that did not; all settings in turn, round after round. The
first of --batches is drawn with every sampler, the others with the first of --samplers. Prints medians, then
one JSON line.
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
from bench.operators import peak_memory  # noqa: E402
from bench.plain_loops import DTYPES  # noqa: E402
from bench.setting import Setting, add_arguments, machine, parsed, setting_of, synchronize  # noqa: E402
from bench.turns import Answers, Contest, Deadline, Worker, ratio, serve, spread  # noqa: E402

import generate_megaman  # noqa: E402
from megaman.config.generate import GenerateConfig  # noqa: E402
from megaman.lora.adapter import Adapter  # noqa: E402
from megaman.model import drawing  # noqa: E402
from megaman.model.drawing import SAMPLERS, pipeline_of, words  # noqa: E402
from megaman.model.stable_diffusion import StableDiffusion  # noqa: E402

PROMPT, NEGATIVE = "mega man, running, facing left, sand background", "blurry"
GUIDANCE = 7.5
IN_A_ROW = {"cuda": 4}  # batches; elsewhere one, after which nothing is at work
Way = tuple[Callable[..., list[Any]], Callable[[list[Any]], object]]


def way_of(base: StableDiffusion) -> Way:
    """What begins a batch, and what waits for what it began: the project's own."""
    try:
        from megaman.model.decoding import Decoder
    except ImportError:  # an earlier checkout's, which waits at once
        return drawing.draw_or_none, list
    decoder = Decoder(base)

    def start(*args: Any, **settings: Any) -> list[Any]:
        return decoder.start(drawing.draw_latents(*args, **settings))

    return start, lambda made: [each.picture() for each in made]


def draw(
    base: StableDiffusion, way: Way, in_a_row: int, side: int, steps: int, batch: int, sampler: str
) -> float:
    """Seconds a picture, of so many at a time."""
    start, wait = way
    started = time.perf_counter()
    made: list[Any] = []
    for _ in range(in_a_row):
        begun = start(
            base, pipeline_of(base, sampler), **words(base, [PROMPT] * batch, [NEGATIVE] * batch),
            num_inference_steps=steps, guidance_scale=GUIDANCE, width=side, height=side,
            generators=[torch.Generator().manual_seed(seed) for seed in range(batch)],
        )  # fmt: skip
        wait(made)
        made = begun
    wait(made)
    synchronize()
    return (time.perf_counter() - started) / batch / in_a_row


def contestant(told: dict[str, Any]) -> tuple[dict[str, Any], Answers]:
    """Loads the base and draws once: its facts, and what it answers."""
    setting = Setting(**told["setting"])
    started = time.perf_counter()
    getattr(generate_megaman, "heap", generate_megaman.memory).keep_freed_memory()  # an earlier checkout's
    device, dtype = torch.device(setting.device), DTYPES[setting.precision]
    base = generate_megaman.load_base(setting.base, Adapter({}), GenerateConfig(), device, dtype)
    base.place("vae", *base.parts)
    loaded = time.perf_counter() - started
    way, settings = way_of(base), (setting.resolution, told["steps"])
    first = draw(base, way, 1, *settings, 1, next(iter(SAMPLERS)))
    work = partial(draw, base, way, IN_A_ROW.get(setting.device, 1), *settings)

    def memory(batch: int, sampler: str) -> dict[str, float | None]:
        return peak_memory(lambda: work(batch, sampler))

    facts = {"load_s": round(loaded, 2), "first_s": round(first, 2), "threads": torch.get_num_threads()}
    return facts, {"draw": work, "memory": memory}


def measure(contest: Contest, flags: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of each setting."""
    batches, samplers = [int(size) for size in flags.batches.split(",")], flags.samplers.split(",")
    settings = [(size, samplers[0]) for size in batches] + [(batches[0], name) for name in samplers[1:]]
    seconds: dict[tuple[int, str], dict[str, list[float]]] = {each: {} for each in settings}
    for number in range(flags.rounds + 1):
        for each in settings if contest.deadline.left else []:
            for name, values in contest.turns(1, "draw", batch=each[0], sampler=each[1]).items():
                if number:  # the first round warms up
                    seconds[each].setdefault(name, []).extend(values)
    rows = []
    for (batch, sampler), times in seconds.items():
        row: dict[str, Any] = {"batch": batch, "sampler": sampler}
        for name, values in times.items():
            memory = contest.ask(name, "memory", batch=batch, sampler=sampler)
            row[name] = {"picture_s": spread(values), **(memory or {})}
            row[name]["pictures_per_s"] = round(1 / row[name]["picture_s"]["median"], 3)
        if len(times) == 2:
            row["ratio"] = ratio(*times.values())
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], contest: Contest) -> None:
    """The table."""
    print(
        f"\n{'batch':>5} {'sampler':9} {'':9} {'s/picture':>10} {'quartiles':>17} {'pictures/s':>10} peak GiB"
    )
    for row in rows:
        for name in [name for name in row if isinstance(row[name], dict)]:
            seconds, held = row[name]["picture_s"], row[name].get("peak_gib")
            low, high = seconds["quartiles"]
            print(
                f"{row['batch']:5} {row['sampler']:9} {name:9} {seconds['median']:10.4f} "
                f"{f'{low:.4f}-{high:.4f}':>17} {row[name]['pictures_per_s']:10.3f} {held}"
            )
        if "ratio" in row:
            print(f"{'':16}ours:against {row['ratio']}")
    for name, reason in contest.failed.items():
        print(f"{name}: failed: {reason}")


def main() -> None:
    """Draws, measures and prints; leaves with 1 if somebody failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--batches", help="1,4,8,16; of large bases 1,4")
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    parser.add_argument("--limit_s", type=float, help="stop after so many seconds with what there is")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    flags = parsed(parser)
    if flags.serve is not None:
        serve(contestant, flags.serve)
        return
    setting, contest = setting_of(flags), Contest(Deadline(flags.limit_s))
    flags.batches = flags.batches or ("1,4,8,16" if setting.kind in ("embedded", "tiny") else "1,4")
    told = {"setting": asdict(setting), "steps": flags.steps}
    projects = {"ours": ROOT} | ({"against": flags.against.resolve()} if flags.against else {})
    hides = setting.device == "cpu"
    try:
        starters = {
            name: partial(Worker, __file__, told, project, hides_cards=hides)
            for name, project in projects.items()
        }
        contest.start(starters, together=False)
        rows = measure(contest, flags)
    finally:
        contest.close()
    show(rows, contest)
    facts = {"bench": "generate", **setting.facts, **machine(setting.device), "steps": flags.steps}
    print(json.dumps(facts | {"rows": rows, "facts": contest.facts, "failed": contest.failed}))
    sys.exit(1 if contest.failed else 0)


if __name__ == "__main__":
    main()
