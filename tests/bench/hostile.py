"""Hostile texts, and counts of what they break: file names, pages, PNG texts, records, prompts files.

Every study answers with counts; all but the first of each must be 0. Nothing is printed. Adapters are in
hostile_adapters.py, models and commands in hostile_models.py, the hub in hub.py.
"""

import contextlib
import io
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

import generate_megaman
import megaman_lora
from megaman.common.console import Exit, UserError, control_in, say
from megaman.data.caption_set import PICTURES
from megaman.data.captions import Caption
from megaman.data.report import Report
from megaman.generation.gallery import render_gallery
from megaman.generation.prompts import Prompt, read_prompts_file
from megaman.generation.records import ImageRecord, infotext, read_records, save_picture, write_records
from megaman.model.stable_diffusion import peek

LONG = 10_000  # characters
ATOMS = (
    "mega man, running", "洛克人，奔跑", "🤖💙👩‍👩‍👧", "e\u0301 ﬁ ß İ", "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>', "</title></style></script><svg onload=alert(1)>",
    "' onclick='alert(1)", "<!--", "]]>", "<b>&amp;&lt;&#60;&quot;</b>", "&nbsp", "javascript:alert(1)",
    "data:text/html,<script>1</script>", "https://example.com/a.js", '<a href="//example.com">',
    '"}\'>{"Prompt":"x"}', '\\"', "\\u003cscript\\u003e", "{{ 7 * 7 }}", "{% raw %}{% include 'x' %}",
    "{# #}", "${x} `x` $(x)", "../../etc/passwd", "..\\..\\x", "/etc/passwd", "C:\\con", "a/b\\c", "..",
    ".", "~", "CON", "NUL", "aux.txt", "com1", "a.png", "\x00", "\x07\x1b[2J\x1b]0;x\x07", "\x7f\x9b31m",
    "\u202egnp.exe", "\u2066\u200f\u200b\ufeff", "\u2028\u2029\u0085", "\ufffe\uffff\U0010ffff", "a\nb",
    "a\r\nb", "\t \n", "Negative prompt: forged", "\nNegative prompt: forged",
    "\nSteps: 1, Sampler: Euler, CFG scale: 1, Seed: 1", "Steps: 1, Seed: 2, Size: 1x1, Model: forged",
    '\nLora hashes: "x: y"', "<lora:x:1>", "<lora:megaman_lora:-9>", "(a:1.5) [b] \\(c\\)",
    "tEXtparameters\x00x", "IEND\xaeB`\x82", "\x89PNG\r\n\x1a\n", "-", "--w 512", "--n bad --d 7",
    " --l nan", "-x", "#", "# a comment", "[trigger]", "%s %d %n", "%2e%2e%2f", "=1+1", "@SUM(A1)", "nan",
    "null", "e", ",,,", "   ",
)  # fmt: skip
GLUE = ("", " ", ", ", "\n", "/", '"', "'", "<", ">", "\\", "\u202e")


def hostile_texts(count: int, seed: int) -> list[str]:
    """`count` texts that try to be markup, paths, settings, options; each atom alone, then mixtures."""
    rng = random.Random(seed)
    return [ATOMS[i] if i < len(ATOMS) else _mixed(rng) for i in range(count)]


def _mixed(rng: random.Random) -> str:
    odd = (
        rng.choice((rng.randrange(0x300), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)))
        for _ in range(3)
    )
    parts = [*rng.choices(ATOMS, k=rng.randint(1, 4)), "".join(map(chr, odd))]
    rng.shuffle(parts)
    text = rng.choice(GLUE).join(parts)
    return (text * LONG)[:LONG] if rng.random() < 0.01 else text


class Page(HTMLParser):
    """What a browser makes of a page: its elements with their attributes' names, the cards, the texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.shapes: list[tuple[str, tuple[str, ...]]] = []
        self.links: set[str] = set()
        self.cards: list[dict[str, Any]] = []
        self.alts: list[str] = []
        self.texts: set[str] = set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.shapes.append((tag, tuple(sorted({name for name, _ in attrs} - {"class"}))))
        values = dict(attrs)
        self.links |= {values[name] for name in ("href", "src", "action", "srcset") if name in values}
        self.cards += [json.loads(values["data-facts"])] if "data-facts" in values else []
        self.alts += [values["alt"]] if "alt" in values and "src" in values else []

    def handle_data(self, data: str) -> None:
        self.texts.add(data)

    def handle_comment(self, data: str) -> None:
        self.shapes.append(("comment", ()))


def tree(folder: Path) -> set[str]:
    """Every file and folder below."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# ---------------------------------------------------------------- prompts


def prompts_study(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Prompts from the configuration to file names, PNGs, metadata.jsonl and pages below folder / "gen"."""
    texts, counts = hostile_texts(count, seed), Counter(prompts=count)
    before, output = tree(folder), folder / "gen"
    records, accepted = _records_of(texts, counts), []
    for i, record in enumerate(records):
        counts["bad_names"] += not re.fullmatch(r"[a-z0-9-]{1,80}\.png", record.file)
        if i % 5 == 0 and not control_in(record.prompt + record.negative_prompt):
            save_picture(Image.new("RGB", (8, 8)), record, output, described=True)
            accepted.append(record)
            counts["changed_texts"] += not _survives_in_png(record, output / record.file)
        counts["forged_settings"] += not _parses(record)
    write_records(output, records)
    written = (output / "metadata.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    counts["changed_texts"] += [json.loads(line)["prompt"] for line in written] != [r.prompt for r in records]
    counts["changed_texts"] += read_records(output) != accepted
    for start in range(0, len(records), 50):
        _look_at_gallery(records[start : start + 50], counts)
    counts["outside"] += len(
        {path for path in tree(folder) - before if path != "gen" and not path.startswith("gen/")}
    )
    names = (
        "prompts",
        "outside",
        "bad_names",
        "foreign_markup",
        "changed_texts",
        "forged_settings",
        "wrong_refusals",
    )
    return {name: counts[name] for name in names}


def _records_of(texts: Sequence[str], counts: Counter[str]) -> list[ImageRecord]:
    """The records of all texts, those that the command line refuses too: a page may hold older ones."""
    settings = {"height": 64, "width": 64, "guidance_scale": 7.5, "negative_prompt": ""}
    for text in texts:
        try:
            generate_megaman.GenerateConfig(prompts=[text], **settings)
            counts["wrong_refusals"] += bool(control_in(text)) or not text.strip()
        except UserError as error:
            refused = (control_in(text) or not text.strip()) and "\n" not in str(error)
            counts["wrong_refusals"] += not refused or error.exit_code != Exit.USAGE
    prompts = [Prompt(text, {"negative_prompt": texts[-i]}) for i, text in enumerate(texts)]
    jobs = generate_megaman.make_jobs(generate_megaman.GenerateConfig(**settings), prompts)
    records = []
    for i, job in enumerate(jobs):
        names = ("adapter", "base_model", "trigger", "lora_file", "adapter_path", "base_path")
        about = {name: texts[(i + at) % len(texts)] for at, name in enumerate(names)}
        about |= {
            "adapter_hash": "0" * 12,
            "lora_hash": "1" * 12,
            "precision": "float32",
            "versions": {"torch": "2"},
        }
        digest = generate_megaman.job_hash(job, "0" * 12, "0" * 12, "float32")
        records.append(generate_megaman.record_of(job, digest, about, 1.0))
    return records


def _survives_in_png(record: ImageRecord, path: Path) -> bool:
    with Image.open(path) as picture:
        held = json.loads(picture.text["megaman"])
        return picture.text["parameters"] == infotext(record) and held["prompt"] == record.prompt


def _parses(record: ImageRecord) -> bool:
    """Whether A1111 reads our settings, prompt and negative prompt by the rules of its
    parse_generation_parameters: settings on the last line; a line that begins with "Negative prompt:" ends
    the prompt; lines are stripped. White space is not compared.
    """
    pairs = r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'
    *lines, last = infotext(record).strip().split("\n")
    prompt, negative, found = "", "", False
    for line in (line.strip() for line in lines):
        if line.startswith("Negative prompt:"):
            found, line = True, line[16:].strip()
        prompt, negative = (prompt, negative + line) if found else (prompt + line, negative)
    name = re.sub(r'[<>:",\\\x00-\x1f]', "_", record.lora_file)
    expected = (f"{record.prompt}<lora:{name}:{record.lora_scale:g}>", record.negative_prompt)
    keys = ["Steps", "Sampler", "CFG scale", "Seed", "Size", "Model", "RNG", "Lora hashes"]
    settings = re.findall(pairs, last)
    values = {
        "Steps": "25",
        "Sampler": "DPM++ 2M",
        "CFG scale": "7.5",
        "Seed": "42",
        "Size": "64x64",
        "RNG": "CPU",
    }
    return (
        [re.sub(r"\s", "", text) for text in (prompt, negative)]
        == [re.sub(r"\s", "", text) for text in expected]
        and [key for key, _ in settings] == keys
        and values.items() <= dict(settings).items()
    )


def _look_at_gallery(records: Sequence[ImageRecord], counts: Counter[str]) -> None:
    """One page of these records, against the page of harmless ones."""
    plain = {record.prompt: f"p{i}" for i, record in enumerate(records)}
    harmless = [
        replace(
            record, prompt=plain[record.prompt], negative_prompt="n", adapter="a", trigger="t", base_model="b"
        )
        for record in records
    ]
    page, expected = Page(render_gallery(records)), Page(render_gallery(harmless))
    counts["foreign_markup"] += page.shapes != expected.shapes or not page.links <= {r.file for r in records}
    facts = {(card["Prompt"], card["Negative prompt"], card["Base"]) for card in page.cards}
    counts["changed_texts"] += facts != {(r.prompt, r.negative_prompt, r.base_model) for r in records}
    counts["changed_texts"] += len({r.prompt for r in records} - page.texts)
    counts["changed_texts"] += {f"{r.prompt} (seed {r.seed})" for r in records} != set(page.alts)


# ---------------------------------------------------------------- captions and pictures' names


def captions_study(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Captions and file names from the disk to the dataset's page, its captions/ folder and the terminal."""
    texts, counts = hostile_texts(count, seed), Counter(captions=count)
    before = tree(folder)
    for start in range(0, count, 250):
        _look_at_dataset(texts[start : start + 250], folder / "data" / str(start), folder / "out", counts)
    own = ("data", "out", "cache")
    counts["outside"] += len({path for path in tree(folder) - before if path.split("/")[0] not in own})
    names = ("captions", "outside", "foreign_markup", "changed_texts", "unprintable_lines")
    return {name: counts[name] for name in names}


def _bare(text: str) -> str:
    """The text without white space and commas: those of several lines become those between tags."""
    return re.sub(r"[\s,]", "", text)


def _look_at_dataset(texts: Sequence[str], data: Path, output: Path, counts: Counter[str]) -> None:
    """Two thirds of the texts as captions, all as file names where the disk takes them."""
    data.mkdir(parents=True)
    expected: dict[str, str] = {}
    plain: set[str] = set()  # pictures with a caption of one line, which stays to the letter
    first = data / "megaman.png"
    Image.new("RGB", (64, 64), "blue").save(first)
    for i, text in enumerate(texts):
        name = f"{i} " + re.sub(r"[/\0]", "-", text)[:40]
        picture = data / f"{name}.png"
        picture.hardlink_to(first)
        if i % 3 and not control_in(text):
            (data / f"{name}.txt").write_text(text, encoding="utf-8", newline="")
            said = re.sub(r"\[trigger\]", "mega man", text.replace("\ufeff", ""), flags=re.I)
            is_line = len([line for line in said.splitlines() if line.split()]) == 1
            plain |= {picture.name} if is_line else set()
            said = " ".join(said.split()) if is_line else _bare(said)
            expected |= {picture.name: said} if said else {}
    flags = [f"--data_dir={data}", f"--output_dir={output}", "--resolution=64", "--mixed_precision=no"]
    flags += [f"--cache_dir={data.parents[1] / 'cache'}", "--pretrained_model_name=megaman/tiny_sd"]
    cfg, _ = megaman_lora.read_config(flags)
    told = megaman_lora.report_of(megaman_lora.open_dataset(cfg, peek(cfg.pretrained_model_name)))
    counts["changed_texts"] += len(told.pictures) != len(texts) + 1
    counts["changed_texts"] += {
        row.name: row.caption.text if row.name in plain else _bare(row.caption.whole)
        for row in told.pictures
        if row.caption.source == "file"
    } != expected
    with contextlib.redirect_stderr(io.StringIO()) as terminal:
        for line in told.lines():
            say(line)
    shown = terminal.getvalue().removesuffix("\n").split("\n")
    counts["unprintable_lines"] += len(shown) != len(told.lines()) or any(map(control_in, shown))
    told.write(output)
    offered = output / "captions" / data.name
    told.offer_captions(offered)
    derived = sum(row.caption.source == "name" for row in told.pictures)
    counts["changed_texts"] += len({path.name for path in offered.iterdir()} - {PICTURES}) != derived
    _look_at_page(told, (output / "dataset.html").read_bytes().decode(), counts)


def _look_at_page(told: Report, text: str, counts: Counter[str]) -> None:
    harmless = [
        replace(
            row,
            name=f"{i}.png",
            caption=Caption("mega man" if row not in told.without_trigger else "x", row.caption.source),
        )
        for i, row in enumerate(told.pictures)
    ]
    plain = replace(told, pictures=harmless).html()
    page, expected = (Page(page.split("<h2>Tags</h2>")[0]) for page in (text, plain))
    counts["foreign_markup"] += page.shapes != expected.shapes or page.links != expected.links
    counts["foreign_markup"] += len(Page(text).shapes) - len(page.shapes) != 2 + 2 * len(told.tags)
    counts["changed_texts"] += {row.name for row in told.pictures} != set(page.alts)
    counts["changed_texts"] += len(
        {row.caption.text for row in told.pictures if row.caption.source == "file"} - page.texts
    )


def prompt_files_study(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Mutated prompts files: what is read is in range, all else is one line with exit code 3."""
    rng, counts = random.Random(seed), Counter(prompt_files=count)
    path, texts = folder / "prompts.txt", hostile_texts(2000, seed + 1)
    options = ("--w", "--h", "--d", "--s", "--l", "--n", "--W", "--x", "--", "-w", "--w512", "--lora_path")
    values = (
        "512",
        "0",
        "-1",
        "1e3",
        "1e999",
        "nan",
        "inf",
        "9" * 30,
        "9" * 5000,
        "0x10",
        "１２",
        "1_0",
        "",
        "64 64",
        "7.5",
    )
    for _ in range(count):
        lines = rng.choices(texts, k=rng.randint(0, 4))
        lines += [f"a {rng.choice(options)} {rng.choice(values)}" for _ in range(rng.randint(0, 2))]
        data = bytearray(
            "\n".join(lines).encode(rng.choice(("utf-8", "utf-8-sig", "utf-16", "utf-8", "utf-8")))
        )
        for _ in range(rng.choice((0, 0, 1, 5)) if data else 0):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data)
        try:
            prompts = read_prompts_file(path)
            counts["read"] += 1
            counts["wrong_values"] += not all(p.text.strip() and _in_range(p.settings) for p in prompts)
        except UserError as error:
            counts["long_lines"] += "\n" in str(error) or len(str(error)) > len(str(path)) + 200
            counts["wrong_codes"] += error.exit_code != Exit.DATA
        except Exception:
            counts["crashes"] += 1
    return {
        name: counts[name]
        for name in ("prompt_files", "wrong_values", "wrong_codes", "long_lines", "crashes")
    }


def _in_range(own: dict[str, Any]) -> bool:
    sizes = all(1 <= own.get(name, 1) <= 8192 for name in ("width", "height", "num_inference_steps"))
    return sizes and 0 <= own.get("seed", 0) < 2**63 and 0 <= own.get("guidance_scale", 0) < 1e9
