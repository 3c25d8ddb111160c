"""Pages that open from the disk, offline, without a server.

Knows jinja2 and the templates; whatever it is given is data and never markup.
"""

import base64
import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megaman.common.console import Exit, UserError

TEMPLATES = Path(__file__).parents[1] / "templates"
PAGE_HEAD_BYTES = 1024
RUN_MARK = b'<meta name="description" content="a training run">'  # among our pages, of a run's
SHARED_SCRIPT = "page.js"
PAGE_MARKS = (
    b'<meta name="generator" content="megaman_lora">',
    b"default-src &#39;none&#39;; img-src &#39;self&#39; file: data:; style-src &#39;unsafe-inline&#39;;",
)
SMALL_PX = 128  # pictures up to this size are shown enlarged, with hard pixels


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name is not None and ".html" in name,  # the model card is Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {}  # keep the order that the template gives
    environment.globals |= {"policy_of": policy_of, "small_px": SMALL_PX}
    return environment


def render(template: str, **values: Any) -> str:
    """Fills a template of templates/ with the values and returns the text."""
    return _environment().get_template(template).render(**values)


def script_of(name: str) -> str:
    """A page's script of templates/ behind what all pages share; the page's policy allows just this one."""
    return "".join((TEMPLATES / each).read_text(encoding="utf-8") for each in (SHARED_SCRIPT, name))


def policy_of(script: str) -> str:
    """What a page may do, whatever a prompt contains: show pictures beside it, and run one script of ours,
    known by its hash.
    """
    digest = base64.b64encode(hashlib.sha256(script_of(script).encode()).digest()).decode()
    return (
        "default-src 'none'; img-src 'self' file: data:; style-src 'unsafe-inline'; script-src "
        f"'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def is_page(path: Path) -> bool:
    """Whether the file is an HTML page that this toolkit made: they name their maker; earlier ones bear our
    policy.
    """
    head = _head_of(path)
    return any(mark in head for mark in PAGE_MARKS)


def is_page_of_run(path: Path) -> bool:
    """Whether the file is the page of a training run."""
    return is_page(path) and RUN_MARK in _head_of(path)


def _head_of(path: Path) -> bytes:
    """A file's first bytes; none, if it can't be read."""
    try:
        with path.open("rb") as file:
            return file.read(PAGE_HEAD_BYTES)
    except OSError:
        return b""


def check_page(path: Path) -> None:
    """UserError (exit 7) if something else than a page of ours lies where one is to be written."""
    if os.path.lexists(path) and not is_page(path):
        raise UserError(f"{path}: is no page of ours. Move it, or name another --output_dir.", Exit.STATE)
