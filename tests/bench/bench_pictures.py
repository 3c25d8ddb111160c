"""Does any damaged picture bring the decoder down, and what does looking at a thousand good ones cost?

    python tests/bench/bench_pictures.py [--mutations 2000] [--seed 0]
    python tests/bench/bench_pictures.py --scan [--pictures 1000] [--work FOLDER]

The first damages small pictures of every kind in tests/test_pictures.py: flipped bits, cuts, pieces copied
elsewhere, ends of other files, and counts what opening them ends with. Files that end in anything but a
picture or a report are kept and named. The second makes pictures of mixed sizes and formats up to a megapixel
in a process of its own, opens each once, takes its fingerprint, and compares them all. Each prints a table,
then one JSON line, and leaves with 1 if a promise is broken.
"""

import argparse
import collections
import json
import multiprocessing
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import PIL  # noqa: E402
from PIL import Image  # noqa: E402
from test_pictures import KINDS, SAMPLES, linear_profile, mutated  # noqa: E402

from megaman.common.console import UserError  # noqa: E402
from megaman.data.folder import find_pictures  # noqa: E402
from megaman.data.pictures import open_picture  # noqa: E402
from megaman.data.scan import duplicates, fingerprint  # noqa: E402

SLOW_S = 5.0  # a small damaged file that takes longer counts as a hang
WAYS = ("PNG", "JPEG", "WEBP", "BMP", "turned JPEG", "PNG with a profile", "transparent PNG")


def peak_mb() -> float:
    """The most memory that this process has held so far; nan on Windows, which has no such count."""
    try:
        import resource
    except ImportError:
        return float("nan")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1 << 20 if sys.platform == "darwin" else 1 << 10)


# ---------------------------------------------------------------- damage


def spliced(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """The beginning of one file and the end of another."""
    return content[: rng.randrange(1, len(content))] + other[rng.randrange(len(other)) :]


def outcome_of(path: Path) -> tuple[str, str]:
    """How opening ends, in a word, and the reason without its numbers."""
    try:
        picture = open_picture(path)
    except UserError as error:
        lead = f"{path}: not a readable picture ("
        if not str(error).startswith(lead) or len(str(error).splitlines()) != 1:
            return "bad report", str(error)
        return "refused", re.sub(r"\d+", "N", str(error)[len(lead) : -1])
    except Exception as error:  # what this program looks for
        return "crash", repr(error)
    return ("picture", "") if picture.image.mode == "RGB" else ("bad picture", picture.image.mode)


def damage(count: int, seed: int) -> dict[str, object]:
    """Opens `count` damaged files. The files that broke a promise are kept."""
    seeds = [(f"sample.{kind.replace('mpo', 'jpg')}", content) for kind, content in SAMPLES.items()]
    seeds += [(name, content) for name, (content, *_) in KINDS.items()]
    outcomes, reasons, slowest = collections.Counter(), collections.Counter(), 0.0
    folder = Path(tempfile.mkdtemp(prefix="bench_pictures_"))
    before, started = peak_mb(), time.perf_counter()
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        name, content = seeds[number % len(seeds)]
        other = rng.choice(seeds)[1]
        path = folder / f"{number:05}{Path(name).suffix}"
        path.write_bytes(spliced(content, other, rng) if rng.random() < 0.2 else mutated(content, rng))
        began = time.perf_counter()
        outcome, reason = outcome_of(path)
        seconds = time.perf_counter() - began
        slowest = max(slowest, seconds)
        outcome = "hang" if seconds > SLOW_S else outcome
        outcomes[outcome] += 1
        reasons[reason] += outcome == "refused"
        if outcome in ("picture", "refused"):
            path.unlink()
        else:
            print(f"{outcome}: {path}: {reason}")
    seconds = time.perf_counter() - started
    print(f"\n{'refused because':70}  files")
    for reason, files in reasons.most_common(25):
        print(f"{reason[:70]:70} {files:6}")
    print(f"\n{dict(outcomes)} in {seconds:.1f} s, the slowest {slowest * 1000:.0f} ms")
    broken = count - outcomes["picture"] - outcomes["refused"]
    if not broken:
        folder.rmdir()
    return {
        "mutations": count, "seed": seed, **outcomes, "broken": broken, "seconds": round(seconds, 1),
        "slowest_ms": round(slowest * 1000, 1), "memory_growth_mb": round(peak_mb() - before, 1),
    }  # fmt: skip


# ---------------------------------------------------------------- a folder of good pictures


def write_picture(path: Path, way: str, rng: np.random.Generator) -> None:
    """A smooth picture with some grain, 64 to 1024 px a side, of at most a megapixel."""
    width, height = (int(rng.integers(64, 1025)) for _ in range(2))
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.integers(-6, 7, (height, width, 1), dtype=np.int16)
    image = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
    options = {}
    if way == "turned JPEG":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    if way == "PNG with a profile":
        options["icc_profile"] = linear_profile()
    if way == "transparent PNG":
        image.putalpha(Image.radial_gradient("L").resize(image.size))
    image.save(path, way.split()[-1] if "JPEG" in way else "PNG" if "PNG" in way else way, **options)


def write_pictures(folder: Path, count: int) -> None:
    """The kinds of WAYS in turn, numbered."""
    rng = np.random.default_rng(1)
    suffixes = {"JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp"}
    for i in range(count):
        way = WAYS[i % len(WAYS)]
        write_picture(folder / f"{i:05}{suffixes.get(way.split()[-1], '.png')}", way, rng)


def scan(folder: Path, count: int) -> dict[str, object]:
    """Opens every picture once and compares their fingerprints."""
    writer = multiprocessing.get_context("spawn").Process(target=write_pictures, args=(folder, count))
    writer.start()  # elsewhere, so that its memory is not counted here
    writer.join()
    found = find_pictures(folder)
    open_picture(found[0])  # the first opening imports the decoders
    spent: dict[str, list[float]] = {way: [] for way in WAYS}
    prints, sizes, pixels, before, memory, started = [], [], 0, peak_mb(), [], time.perf_counter()
    for path in found:
        began = time.perf_counter()
        image = open_picture(path).image
        prints.append(fingerprint(image))
        sizes.append(image.size)
        spent[WAYS[int(path.stem) % len(WAYS)]].append((time.perf_counter() - began) * 1000)
        pixels += image.width * image.height
        memory.append(peak_mb())
    seconds = time.perf_counter() - started
    began = time.perf_counter()
    pairs = duplicates(prints, sizes)
    compared = time.perf_counter() - began
    print(f"{'kind':20} {'pictures':>8} {'median ms':>10} {'p95 ms':>8}")
    for way, times in spent.items():
        print(f"{way:20} {len(times):8} {statistics.median(times):10.1f} {np.percentile(times, 95):8.1f}")
    print(f"\n{len(found)} pictures, {pixels / 1e6:.0f} megapixels: {seconds:.1f} s to open and fingerprint,")
    print(f"{compared:.3f} s to compare, {len(pairs)} duplicates")
    half = memory[len(memory) // 2]
    print(f"memory: {before:.0f} MB before, {memory[-1] - before:.0f} MB more at the peak, of these")
    print(f"{memory[-1] - half:.0f} MB in the second half of the folder")
    return {
        "pictures": len(found), "megapixels": round(pixels / 1e6, 1), "seconds": round(seconds, 2),
        "ms_per_megapixel": round(seconds * 1e9 / pixels, 1), "compare_s": round(compared, 3),
        "duplicates": len(pairs), "broken": int(len(found) != count),
        "memory_growth_mb": round(memory[-1] - before, 1), "second_half_mb": round(memory[-1] - half, 1),
    }  # fmt: skip


def main() -> None:
    """Runs one of the two; leaves with 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scan", action="store_true", help="time good pictures instead of damaging some")
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--work", type=Path, help="where the pictures of --scan go for the time (temporary)")
    flags = parser.parse_args()
    if flags.scan:
        with tempfile.TemporaryDirectory(prefix="bench_pictures_", dir=flags.work) as folder:
            result = scan(Path(folder), flags.pictures)
    else:
        result = damage(flags.mutations, flags.seed)
    machine = {"machine": platform.machine(), "python": platform.python_version(), "pillow": PIL.__version__}
    print(json.dumps({"bench": "pictures", "part": "scan" if flags.scan else "damage"} | result | machine))
    sys.exit(1 if result["broken"] else 0)


if __name__ == "__main__":
    main()
