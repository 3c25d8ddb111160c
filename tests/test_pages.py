"""Pages: whatever a prompt holds, it stays text."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from megaman.pages import TEMPLATES, render_gallery, render_samples
from megaman.records import ImageRecord

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


def record(prompt: str = "mega man", file: str = "a.png") -> ImageRecord:
    return ImageRecord(
        file=file,
        prompt=prompt,
        negative_prompt=prompt,
        seed=0,
        width=64,
        height=64,
        num_inference_steps=2,
        guidance_scale=7.5,
        scheduler="dpm++",
        lora_scale=1.0,
        adapter=prompt,
        adapter_hash="0" * 12,
        base_model="base",
        trigger=prompt,
        precision="float32",
        job="0",
        created="2026-01-01T00:00:00+00:00",
        seconds=1.0,
        versions={},
    )


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
    samples = Reader(render_samples([prompt], {0: ["a.png"]}, (64, 64)))
    assert [tag for tag, _ in samples.tags].count("script") == 0
    assert any(prompt.split("\0")[0] in text for text in samples.texts)


def test_a_page_refers_to_nothing_but_its_own_pictures() -> None:
    for page in (render_gallery([record(file="a b#.png")]), render_samples(["x"], {0: ["a.png"]}, (64, 64))):
        links = [a[name] for _, a in Reader(page).tags for name in ("src", "href") if name in a]
        assert set(links) <= {"a%20b%23.png", "a.png", None}
        assert "http://" not in page
        assert "https://" not in page
        assert "default-src &#39;none&#39;" in page


def test_the_policy_allows_exactly_our_script() -> None:
    import base64
    import hashlib

    page = render_gallery([record()])
    script = page.split("<script>")[1].split("</script>")[0]
    assert script == (TEMPLATES / "gallery.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"sha256-{digest}" in Reader(page).tags[3][1]["content"]


def test_a_prompt_with_several_pictures_has_a_row_and_single_ones_share_a_grid() -> None:
    page = render_gallery(
        [record("b", "1.png"), record("a", "2.png"), record("b", "3.png"), record("c", "4.png")]
    )
    assert page.count("<section>") == 2
    assert page.index("<h2>b</h2>") < page.index('src="1.png"') < page.index('src="3.png"')
    assert page.index('src="3.png"') < page.index("<b>a</b>") < page.index("<b>c</b>")


def test_an_empty_gallery_says_so(tmp_path: Path) -> None:
    assert "No pictures yet." in render_gallery([])
