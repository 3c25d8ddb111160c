"""Pages that open from the disk, offline, without a server.

Knows HTML and jinja2; whatever it is given is data and never markup.
"""

import base64
import hashlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megaman.common.console import OK, STATE, UserError, say
from megaman.common.files import OutputLock, write_text
from megaman.config.generate import GenerateConfig
from megaman.generation import gallery, records
from megaman.generation.records import ImageRecord

TEMPLATES = Path(__file__).parents[1] / "templates"
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


def render_gallery(drawn: Sequence[ImageRecord]) -> str:
    """The gallery, in the order given. Works without JavaScript as a plain page of pictures."""
    script = (TEMPLATES / "gallery.js").read_text(encoding="utf-8")
    template = _environment().get_template("gallery.html.j2")
    return template.render(records=drawn, script=script, small_px=SMALL_PX, gallery=gallery)


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


def answer_gallery_only(cfg: GenerateConfig) -> None:
    """Makes the gallery anew and ends the program, if that is all that is asked."""
    if cfg.gallery_only:
        say(f"done: open {rebuild(Path(cfg.output_dir))} in a browser")
        sys.exit(OK)


def rebuild(output: Path) -> Path:
    """Makes the gallery anew of the pictures that are there. UserError (exit 7) if there never were any."""
    if not records.holds_gallery(output):  # perhaps a folder of the user's
        reason = "holds no pictures of ours to show; draw some first, or name their folder with --output_dir"
        raise UserError(f"{output}: {reason}", STATE)
    records.check_folder(output)
    with closing(OutputLock(output).sign()):
        found = records.find_records(output)
        show_all(output, found)
    say(f"pictures: {len(found)}")
    return output / records.PAGE


def show_all(output: Path, drawn: Sequence[ImageRecord]) -> None:
    """metadata.jsonl and the gallery of it."""
    records.write_records(output, drawn)
    write_text(output / records.PAGE, render_gallery(drawn))
