"""Pages that open from the disk, offline, without a server.

Knows HTML and jinja2; whatever it is given is data and never markup.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megaman import gallery
from megaman.records import ImageRecord

TEMPLATES = Path(__file__).parent / "templates"
SMALL_PX = 128  # pictures up to this size are shown enlarged, with hard pixels


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {}  # keep the order that the template gives
    environment.globals["policy"] = _content_policy()
    return environment


def _content_policy() -> str:
    """The page may show pictures beside it and run its own script, known by its hash; nothing else,
    whatever a prompt contains.
    """
    script = (TEMPLATES / "gallery.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        "default-src 'none'; img-src 'self' file: data:; style-src 'unsafe-inline'; script-src "
        f"'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def render_gallery(records: Sequence[ImageRecord]) -> str:
    """The gallery, in the order given. Works without JavaScript as a plain page of pictures."""
    script = (TEMPLATES / "gallery.js").read_text(encoding="utf-8")
    template = _environment().get_template("gallery.html.j2")
    return template.render(records=records, script=script, small_px=SMALL_PX, gallery=gallery)


def render_samples(
    prompts: Sequence[str], samples: Mapping[int, Sequence[str]], size: tuple[int, int]
) -> str:
    """How the sample pictures evolve: a row a prompt, a column a step. samples: step -> a file a prompt;
    size: width and height in pixels.
    """
    return (
        _environment()
        .get_template("samples.html.j2")
        .render(prompts=prompts, samples=samples, size=size, small_px=SMALL_PX)
    )


def render_dataset(report: Any, max_tokens: int) -> str:
    """The dataset's page: every picture with what of it is seen. report: a report.Report."""
    template = _environment().get_template("dataset.html.j2")
    return template.render(report=report, max_tokens=max_tokens, small_px=SMALL_PX)
