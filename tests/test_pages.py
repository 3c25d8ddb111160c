"""Pages: whatever a prompt holds, it stays text; what belongs together stands together; and in a browser, if
there is one, every control does what it says.
"""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, NoBrowser, browser
from PIL import Image

import generate_megaman
from megaman.common.html import TEMPLATES, script_of
from megaman.common.output_folder import RunFolder
from megaman.generation.gallery import command, newest, render_gallery
from megaman.generation.records import ImageRecord
from megaman.training.run_page import render_run

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</title></style></script><svg onload=alert(1)>",
    "' onclick='alert(1)",
    "{{ 7 * 7 }} {% raw %}",
    "<lora:megaman:1>",
    "javascript:alert(1)",
    "\u202e right to left \u0000 &amp; &lt;",
)


def record(prompt: str = "mega man", file: str = "a.png", **changes: Any) -> ImageRecord:
    facts = {
        "file": file,
        "prompt": prompt,
        "negative_prompt": prompt,
        "seed": 0,
        "width": 64,
        "height": 64,
        "num_inference_steps": 2,
        "guidance_scale": 7.5,
        "scheduler": "dpm++",
        "lora_scale": 1.0,
        "adapter": prompt,
        "adapter_hash": "0" * 12,
        "base_model": "base",
        "trigger": prompt,
        "precision": "float32",
        "job": file,
        "created": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
        "versions": {},
    }
    return ImageRecord(**facts | changes)


class Reader(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("prompt", HOSTILE)
def test_nothing_in_a_prompt_becomes_markup(prompt: str) -> None:
    harmless, page = Reader(render_gallery([record()])), Reader(render_gallery([record(prompt)]))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]
    assert [set(attributes) for _, attributes in page.tags] == [
        set(attributes) for _, attributes in harmless.tags
    ]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert prompt.replace("\0", "\ufffd") in [text.replace("\0", "\ufffd") for text in page.texts]


def run_told(folder: Path, prompt: str) -> Path:
    """The page of a run with everything in it, of which each text is the prompt; its pictures are there."""
    samples = [(folder / "samples" / f"step-{step:06}") for step in (0, 500, 1000)]
    for place in samples:
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), "navy").save(place / "01.png")
    for step in (500, 1000):
        (folder / "checkpoints" / f"step-{step:06}").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [
        {"step": 0, "dataset": {"pictures": 30, "sizes": {prompt: 30}, "held out": 3}}
    ]
    rows += [{"step": step, "samples": [prompt]} for step in (0, 500, 1000)]
    for step in range(10, 1001, 10):
        norm = None if step % 70 == 0 else 1 / step
        told = {"lr": 1e-4, "lr_text_encoder": 1e-5, "grad_norm": norm, "images_per_s": 3.2}
        rows.append({"step": step, "loss": 0.1 + (step * 7919 % 100) / 1000, **told})
    rows += [{"step": step, "validation_loss": 0.2 - step / 1e4} for step in (0, 500, 1000)]
    for step, whole in ((500, 0.001), (1000, 0.5)):
        blocks = {"unet.mid_block": whole, "text_encoder": 0.02, prompt: 0.001}
        rows.append({"step": step, "strength": whole, "block_strengths": blocks})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    names = ("pretrained_model_name", "data_dir", "lora_rank", "lora_alpha", "trigger", prompt)
    record = dict.fromkeys(names, prompt) | {"validation_prompt": [prompt], "max_train_steps": 2000}
    (folder / "training_config.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "dataset.html").write_text('<meta name="generator" content="megaman_lora">', encoding="utf-8")
    page = folder / "index.html"
    page.write_text(render_run(RunFolder(folder)), encoding="utf-8", newline="\n")
    return page


@pytest.mark.parametrize("prompt", HOSTILE)
def test_nothing_in_a_runs_texts_becomes_markup(prompt: str, tmp_path: Path) -> None:
    harmless, page = (
        Reader(run_told(tmp_path / name, text).read_text(encoding="utf-8"))
        for name, text in (("a", "harmless"), ("b", prompt))
    )
    assert [(tag, set(a)) for tag, a in page.tags] == [(tag, set(a)) for tag, a in harmless.tags]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert prompt.replace("\0", "\ufffd") in [text.replace("\0", "\ufffd") for text in page.texts]


def test_a_page_refers_to_nothing_but_its_own_pictures(tmp_path: Path) -> None:
    of_run = run_told(tmp_path, "x").read_text(encoding="utf-8")
    samples = {f"samples/step-{step:06}/01.png" for step in (0, 500, 1000)}
    for page in (render_gallery([record(file="a b#.png")]), of_run):
        links = [a[name] for _, a in Reader(page).tags for name in ("src", "href") if name in a]
        assert set(links) <= {"a%20b%23.png", "dataset.html", *samples, None}
        assert "http://" not in page
        assert "https://" not in page
        assert "default-src &#39;none&#39;" in page


def test_the_policy_allows_exactly_our_script(tmp_path: Path) -> None:
    of_run = run_told(tmp_path, "x").read_text(encoding="utf-8")
    for page, name in ((render_gallery([record()]), "gallery.js"), (of_run, "run.js")):
        script = page.split("<script>")[1].split("</script>")[0]
        assert script == script_of(name)
        assert script.endswith((TEMPLATES / name).read_text(encoding="utf-8"))
        assert f"script-src 'sha256-{digest_of(script)}';" in page_policy(page)


def page_policy(page: str) -> str:
    """The content policy that a page states."""
    stated = (attributes for tag, attributes in Reader(page).tags if tag == "meta")
    return next(each["content"] for each in stated if each.get("http-equiv") == "Content-Security-Policy")


def digest_of(script: str) -> str:
    """A script's name in a content policy."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def test_an_empty_gallery_says_so() -> None:
    assert "No pictures yet." in Reader(render_gallery([])).texts


# ---------------------------------------------------------------- what stands beside what


class Layout(HTMLParser):
    """The gallery's sections: each a title and its scenes; a scene is its rows of texts and files."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sections: list[dict[str, Any]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "section":
            self.sections.append({"title": None, "scenes": []})
        elif "scene" in (values.get("class") or "").split():
            self.sections[-1]["scenes"].append([[]])
        elif tag == "tr":
            self.sections[-1]["scenes"][-1].append([])
        elif tag == "img" and self.sections:
            self.sections[-1]["scenes"][-1][-1].append(values["src"])
        self.tag = tag

    def handle_data(self, data: str) -> None:
        if not self.sections or not data.strip(" \n·"):
            return
        if self.tag == "h2" and self.sections[-1]["title"] is None:
            self.sections[-1]["title"] = data
        elif self.sections[-1]["scenes"] and self.tag in ("span", "b"):
            self.sections[-1]["scenes"][-1][-1].append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "main":
            self.sections, self.found = [], self.sections


def layout(*records: ImageRecord) -> list[dict[str, Any]]:
    """The sections of a gallery."""
    return Layout(render_gallery(records)).found


STEPS = {"step-000250": "aaaaaa000000", "step-000500": "bbbbbb000000", "megaman_lora": "cccccc000000"}


def drawn(adapter: str, scale: float, **changes: Any) -> ImageRecord:
    """A picture named after its adapter and strength."""
    name = f"{adapter.replace('_', '-')}-{scale:g}.png".replace(".", "x", f"{scale:g}".count("."))
    return record("mm", name, adapter=adapter, adapter_hash=STEPS[adapter], lora_scale=scale, **changes)


def test_a_prompt_with_several_seeds_has_a_section_and_others_share_one() -> None:
    alone = record("a", "2.png"), record("c", "4.png")
    first, second = layout(record("b", "1.png"), alone[0], record("b", "3.png", seed=7), alone[1])
    assert first == {
        "title": "b",
        "scenes": [[["1.png", "b", "seed 0", "strength 1"]], [["3.png", "b", "seed 7", "strength 1"]]],
    }
    assert second["title"] is None
    assert [scene[0][:2] for scene in second["scenes"]] == [["2.png", "a"], ["4.png", "c"]]


def test_strengths_of_one_picture_make_a_strip_from_weak_to_strong() -> None:
    files = {1.0: "1.png", 0.0: "0.png", 0.5: "5.png", -0.5: "m.png"}
    ((scene,),) = [
        section["scenes"]
        for section in layout(*(record("mm", file, lora_scale=scale) for scale, file in files.items()))
    ]
    assert scene == [
        [
            *("mm", "seed 0", "m.png", "strength -0.5", "0.png", "base alone"),
            *("5.png", "strength 0.5", "1.png", "strength 1"),
        ]
    ]


def test_checkpoints_make_a_strip_and_with_strengths_a_grid_beside_the_base() -> None:
    base = drawn("megaman_lora", 0.0)
    strip = [drawn(name, 1.0) for name in STEPS]
    ((scene,),) = [section["scenes"] for section in layout(*strip, base)]
    assert scene[0][2:] == [
        *("megaman-lora-0.png", "base alone", "step-000250-1.png", "step 250"),
        *("step-000500-1.png", "step 500", "megaman-lora-1.png", "megaman_lora"),
    ]
    grid = [drawn(name, scale) for scale in (2.0, 1.0) for name in STEPS]
    ((scene,),) = [section["scenes"] for section in layout(base, *grid)]
    assert scene[1:] == [
        ["base alone", "strength 1", "strength 2"],
        ["step 250", "megaman-lora-0.png", "step-000250-1.png", "step-000250-2.png"],
        ["step 500", "step-000500-1.png", "step-000500-2.png"],
        ["megaman_lora", "megaman-lora-1.png", "megaman-lora-2.png"],
    ]


def test_the_page_names_the_adapter_that_drew_last() -> None:
    old = record("mm", "0.png", created="2026-01-02T10:00:00", adapter="megaman_lora")
    last = record("mm", "1.png", created="2026-01-02T11:00:00", adapter="step-000250")
    for order in ([old, last], [last, old]):
        assert newest(order) is last
    beside = record("mm", "2.png", created="2026-01-02T11:00:00", adapter="hero")
    assert newest([last, beside]) is beside


def test_two_adapters_of_one_name_are_told_apart_and_no_picture_is_lost() -> None:
    twins = [record("mm", f"{h}.png", adapter="hero", adapter_hash=h * 12) for h in "ab"]
    ((scene,),) = [section["scenes"] for section in layout(*twins)]
    assert scene[0][2:] == ["a.png", "hero (aaaaaa)", "b.png", "hero (bbbbbb)"]
    same = [record("mm", f"{i}.png") for i in range(3)]
    ((scene,),) = [section["scenes"] for section in layout(*same)]
    assert {"0.png", "1.png", "2.png"} < set(scene[0])


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"width": 128}, {"scheduler": "ddim"}, {"precision": "float16"}]
)
def test_pictures_that_differ_in_more_than_the_adapter_are_not_compared(change: dict[str, object]) -> None:
    (section,) = layout(record("mm", "0.png", lora_scale=0.0), record("mm", "1.png", **change))
    assert len(section["scenes"]) == 2


# ---------------------------------------------------------------- the command


def words_of(line: str) -> list[str]:
    """What a POSIX shell makes of a command that begins with `python`."""
    shell = shutil.which("sh")
    if shell is None:
        pytest.skip("no POSIX shell here")
    script = "python() { printf '%s\\0' \"$@\"; }\n" + line
    said = subprocess.run([shell, "-c", script], capture_output=True, check=True)
    assert said.stderr == b""
    return said.stdout.decode().split("\0")[:-1]


PASTED = ["it's & calc", "&& exit 3 | cat > hacked", "~/x *.png # no comment", "--seed 7", "-x", "; ls",
          "洛克人，奔跑 🤖", "a=b", "(robot:1.2), 'single'", "<b>x</b>", "^a ‘b’"]  # fmt: skip
STEERING = ['"quoted"', "$(touch hacked)", "${HOME}", "`touch hacked`", "a\\", "100%", "%PATH%", "wow!",
            "a\nb", "“ & calc", "a”b", "\x1b[201~", "\r", "\t", "\x00", "\x85", "\x9b", "\x03"]  # fmt: skip


@pytest.mark.parametrize("prompt", PASTED)
def test_the_copied_command_gives_a_shell_the_very_settings(
    prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture = record(
        prompt, seed=2**60, lora_scale=-0.25, precision="float16", adapter="a b", base_model="o/m"
    )
    script, *arguments = words_of(command(picture))
    assert script == "generate_megaman.py"
    cfg = generate_megaman.read_config(arguments)
    assert cfg.prompts == [prompt]
    assert (cfg.negative_prompt, cfg.seed, cfg.lora_scale) == (prompt, 2**60, [-0.25])
    assert (cfg.lora_path, cfg.base_model, cfg.mixed_precision) == ("a b", "o/m", "fp16")
    asked = (cfg.width, cfg.height, cfg.num_inference_steps, cfg.guidance_scale, cfg.scheduler)
    assert asked == (64, 64, 2, 7.5, "dpm++")
    assert not any(tmp_path.iterdir())


def test_a_command_quotes_as_every_shell_does() -> None:
    words = re.findall(r'"[^"]*"|[^" ]+', command(record("it's; <b> & calc | x ^ y")))
    assert '"--prompts=it\'s; <b> & calc | x ^ y"' in words
    assert all(re.fullmatch(r'"[^"$`\\%!]*"|[\w=+.-]+', word) for word in words)


def test_the_command_names_the_usual_place_of_an_adapter_and_no_local_base() -> None:
    place = {
        name: generate_megaman.read_config(words_of(command(drawn(name, 1.0)))[1:]).lora_path
        for name in STEPS
    }
    assert place["megaman_lora"] == generate_megaman.GenerateConfig().lora_path
    assert place["step-000250"] == "./megaman_lora_output/checkpoints/step-000250"
    assert "--base_model" not in command(record(base_model="my folder"))


@pytest.mark.parametrize("text", STEERING)
def test_a_text_that_some_shell_or_terminal_would_act_on_gives_no_command(text: str) -> None:
    for name in ("prompt", "negative_prompt", "adapter"):
        assert command(record(**{name: f"a {text} b"})) == ""


# ---------------------------------------------------------------- the words


def chinese_of(script: str) -> dict[str, str]:
    """The table of a page's script, by its English; each has the same places for numbers."""
    table = script.split("const CHINESE = {")[1].split("\n};")[0]
    known = dict(re.findall(r'"((?:[^"\\]|\\.)*)":\s*"((?:[^"\\]|\\.)*)",', table))
    for english, chinese in known.items():
        assert set(re.findall(r"{\w+}", english)) == set(re.findall(r"{\w+}", chinese)), english
    return known


def test_every_text_of_a_runs_page_has_its_chinese(tmp_path: Path) -> None:
    known = chinese_of(script_of("run.js"))
    template = (TEMPLATES / "run.html.j2").read_text(encoding="utf-8")
    page = Reader(run_told(tmp_path, "x").read_text(encoding="utf-8"))
    names = ("data-t", "data-label")
    shown = {a[name] for _, a in page.tags for name in names if name in a}
    shown |= set(re.findall(r'say\("([^"]+)"', template)) | set(re.findall(r': "([A-Z][^"]+)"', template))
    shown |= set(re.findall(r'"(Theme: \w+)"', script_of("run.js").split("const CHINESE")[0]))
    assert len(shown) > 40
    assert shown <= known.keys()


def test_every_text_of_the_page_has_its_chinese() -> None:
    script = script_of("gallery.js")
    known = chinese_of(script)
    page = Reader(render_gallery([drawn(name, scale) for name in STEPS for scale in (0.0, 1.0, 2.0)]))
    names = ("data-t", "data-label", "data-hint")
    shown = {a[name] for _, a in page.tags for name in names if name in a} - {"{n}"}
    shown |= set(re.findall(r'told\("([^"]+)"', script)) | set(re.findall(r'Label: "([^"]+)"', script))
    shown |= set(re.findall(r'"(Theme: \w+)"', script.split("const CHINESE")[0]))
    shown |= set(json.loads(next(a["data-facts"] for _, a in page.tags if "data-facts" in a)))
    assert len(shown) > 45
    assert shown - {"Prompt", "Job", "Command"} <= known.keys()


# ---------------------------------------------------------------- in a browser

DRIVER = Path(__file__).parent / "data" / "gallery_driver.js"
EVIL = "\"><img src=x onerror=\"hacked='yes'\"><svg onload=\"hacked='yes'\"> $& it's"


def reopened(chromium: Browser, page: Path) -> list[str]:
    """Theme, language and favourites of the page when it is opened again. It may get a process of its own,
    which hears only in a moment of what the last one stored.
    """
    until = time.monotonic() + 10
    while True:
        chromium.open(page)
        found = chromium.run(
            "[document.documentElement.dataset.theme, document.documentElement.lang, "
            "document.querySelector('#starred').textContent]"
        )
        if found[0] or time.monotonic() > until:
            return found
        time.sleep(0.1)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a browser says when every control of a gallery was used: a pair, a grid, a single picture."""
    folder = tmp_path_factory.mktemp("gallery")
    pair = {"prompt": "running, sand", "seed": 7, "base_model": "o/m", "adapter": "hero"}
    pictures = [
        record(file="pair-0.png", lora_scale=0.0, **pair),
        record(file="pair-1.png", lora_scale=1.0, **pair),
        drawn("megaman_lora", 0.0),
        *(drawn(name, scale) for name in STEPS for scale in (1.0, 2.0)),
        record(EVIL, "evil.png", seed=7),
    ]
    for picture in pictures:
        Image.new("RGB", (64, 64), "navy").save(folder / picture.file)
    page = folder / "index.html"
    page.write_text(render_gallery(pictures), encoding="utf-8", newline="\n")
    try:
        with browser(folder / "profile") as chromium:
            chromium.open(page)
            results = chromium.run(f"(() => {{ {DRIVER.read_text(encoding='utf-8')} }})()")
            results["reloaded"] = reopened(chromium, page)
            return results
    except NoBrowser as reason:
        pytest.skip(str(reason))


GRID = ["megaman-lora-0.png", "step-000250-1.png", "step-000250-2.png", "step-000500-1.png"]
GRID += ["step-000500-2.png", "megaman-lora-1.png", "megaman-lora-2.png"]
PAGE = ["pair-0.png", "pair-1.png", *GRID, "evil.png"]


def test_in_a_browser_a_prompt_is_text(seen: dict[str, Any]) -> None:
    assert seen["scripts"] == 1
    assert seen["foreign"] == [0, "no"]


def test_in_a_browser_search_and_filters_leave_what_matches(seen: dict[str, Any]) -> None:
    assert seen["all"] == seen["again"] == PAGE
    assert seen["facets"] == [["LoRA strength", 3], ["Adapter", 5], ["Seed", 2], ["Base", 2]]
    assert seen["searched"] == ["pair-0.png", "pair-1.png"]
    assert seen["status"] == "2 of 10 pictures"
    assert seen["hiddenScenes"] == 2
    assert seen["nothing"] == [[], "No picture matches."]
    assert seen["strong"] == [name for name in PAGE if name.endswith("1.png") or name == "evil.png"]
    assert seen["heads"] == ["base alone", "strength 1", "step 250", "step 500", "megaman_lora"][:2]


def test_in_a_browser_pictures_are_grouped_by_seed_and_back(seen: dict[str, Any]) -> None:
    assert seen["seeds"] == ["seed 7", "seed 0"]
    assert seen["bySeed"] == ["pair-0.png", "pair-1.png", "evil.png", *GRID]
    assert seen["byPrompt"] == PAGE


def test_in_a_browser_keys_and_buttons_lead_through_the_pictures(seen: dict[str, Any]) -> None:
    assert seen["opened"] == [True, "pair-0.png", "running, sand"]
    assert (seen["right"], seen["left"], seen["home"], seen["end"], seen["next"]) == (
        *("pair-1.png", "evil.png", "pair-0.png", "evil.png", "pair-0.png"),
    )
    assert seen["siblings"] == ["base", "strength 1"]
    assert seen["sibling"] == "pair-0.png"
    assert seen["closed"] == [False, "pair-0.png"]


def test_in_a_browser_base_and_lora_lie_under_a_slider(seen: dict[str, Any]) -> None:
    assert seen["noSlider"] == [True, 0]  # the base itself
    assert seen["compared"] == ["pair-0.png", "pair-1.png"]
    assert (seen["isPressed"], seen["slides"], seen["uncompared"]) == ("true", 1, 1)
    assert seen["clip"] == "inset(0px 0px 0px 20%)"
    pairs = [["pair-0.png", "pair-1.png"], *(["megaman-lora-0.png", name] for name in GRID[1:])]
    assert (seen["sliders"], seen["sectionsHidden"], seen["backAgain"]) == (pairs, True, [False, 0])


def test_in_a_browser_prompt_seed_and_command_are_copied(seen: dict[str, Any]) -> None:
    line = command(record("running, sand", seed=7, lora_scale=0.0, base_model="o/m", adapter="hero"))
    assert seen["copied"] == ["running, sand", "7", line, "7"]
    assert seen["told"] == "Copied"


def test_in_a_browser_favourites_are_kept_and_exported(seen: dict[str, Any]) -> None:
    assert seen["starred"] == "★ Favourite"
    assert seen["only"] == [facts["File"] for facts in seen["exported"]] == ["pair-0.png"]
    assert seen["count"] == "★ 2"
    assert seen["refused"][0] == "★ 3"  # in memory, where the browser keeps nothing
    assert "export your favourites" in seen["refused"][1]
    assert seen["reloaded"][2] == "★ 2"


def test_in_a_browser_theme_and_language_change_and_are_remembered(seen: dict[str, Any]) -> None:
    assert seen["light"] == ["light", "rgb(246, 245, 241)"]
    assert seen["dark"] == ["dark", "rgb(21, 22, 26)"]
    assert seen["system"] in (seen["light"][1], seen["dark"][1])
    assert seen["chinese"] == ["zh-TW", *["洛克人 LoRA 畫廊"] * 2, "搜尋提示詞、種子、檔名"]
    assert seen["reloaded"][:2] == ["dark", "zh-TW"]


# ---------------------------------------------------------------- a run's page in a browser

WIDTHS_PX = (390, 1280, 1920)
SEEN_OF_A_RUN = """(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const box = (each) => each.getBoundingClientRect(), curves = all(".plot path:not(.mark):not(.grid)");
  const isOutside = (each) => !each.closest(".strip, code, svg") && box(each).right > innerWidth + 1;
  const texts = all("[data-t]").map((each) => each.textContent);
  return {
    language: document.documentElement.lang, texts, title: document.querySelector("h1").textContent,
    wide: document.documentElement.scrollWidth - innerWidth,
    outside: all("main *").filter(isOutside).map((each) => each.outerHTML.slice(0, 90)),
    flat: curves.filter((each) => box(each).width < 50).length, curves: curves.length,
    pictures: all("img").filter((each) => each.loading === "lazy").length, hacked: window.hacked ?? "no",
  };
})()"""


@pytest.fixture(scope="module")
def run_seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a browser shows of a run's page in each width, in both languages, and what it complains of."""
    folder = tmp_path_factory.mktemp("run")
    page = run_told(folder, EVIL)
    found: dict[str, Any] = {}
    try:
        with browser(folder / "profile") as chromium:
            for domain in ("Network", "Log", "Runtime"):
                chromium.ask(f"{domain}.enable")
            for width in WIDTHS_PX:
                shape = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
                chromium.ask("Emulation.setDeviceMetricsOverride", **shape)
                chromium.open(page)
                found[f"{width} first"] = chromium.run(SEEN_OF_A_RUN)
                found[f"{width} other"] = chromium.run(
                    f"document.querySelector('#language').click() ?? {SEEN_OF_A_RUN}"
                )
                chromium.run("document.querySelector('#theme').click()")
            chromium.run("new Promise((done) => setTimeout(done, 200))")
            found["theme"] = chromium.run("document.documentElement.dataset.theme ?? ''")
            found["events"] = chromium.events
            return found
    except NoBrowser as reason:
        pytest.skip(str(reason))


def test_in_a_browser_a_runs_page_fits_every_width_in_both_languages(run_seen: dict[str, Any]) -> None:
    for width in WIDTHS_PX:
        both = [run_seen[f"{width} {which}"] for which in ("first", "other")]
        assert {each["language"] for each in both} == {"en", "zh-TW"}
        pairs = zip(both[0]["texts"], both[1]["texts"], strict=True)
        assert {one for one, other in pairs if one == other} == {"UNet"}
        titles = {each["language"]: each["title"] for each in both}
        assert (titles["en"].split(" ")[0], titles["zh-TW"][-3:]) == ("Training", "的訓練")
        for each in both:
            assert each["wide"] <= 0
            assert each["outside"] == []
            assert (each["flat"], each["curves"], each["pictures"], each["hacked"]) == (0, 6, 3, "no")
    assert run_seen["theme"] in ("", "light", "dark")


def test_in_a_browser_a_runs_page_asks_for_nothing_and_complains_of_nothing(run_seen: dict[str, Any]) -> None:
    asked = [
        each["params"]["request"]["url"]
        for each in run_seen["events"]
        if "requestWillBeSent" in each["method"]
    ]
    assert len(asked) >= len(WIDTHS_PX)
    assert all(url.startswith("file:///") for url in asked)
    complaints = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    assert [each for each in run_seen["events"] if each["method"] in complaints] == []
