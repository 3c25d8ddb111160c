"""What the user is told when the hub has not what was asked for. A server on this machine answers as the hub.

A process of its own (`python tests/bench/hub.py`), for the hub's address is read once, when the library is
imported. Prints one JSON line: the message in each case.
"""

import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
COMMIT = "1" * 40
FAULTS = {  # the owner's name -> what the hub answers to whatever is asked of it
    "gated": (
        403,
        {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model gated/it is restricted"},
    ),
    "locked": (
        401,
        {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model locked/it is restricted"},
    ),
    "missing": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "deleted": (401, {"X-Error-Message": "Invalid username or password."}),
    "busy": (503, {}),
}
FILES: dict[str, list[str]] = {  # of the repositories that are there
    "pickled": ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.bin"],
    "other": ["config.json", "model.safetensors"],
}
BASE = Path(__file__).resolve().parents[2] / "megaman" / "tiny_sd"
THIN = "thin"  # has the embedded base, its weights under the names of the fp16 variant alone
HALF = (
    "half",
    "torn",
)  # were left by a broken download; the hub lists the first one, and has lost it
INDEX = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}


class Hub(BaseHTTPRequestHandler):
    """Answers GET and HEAD."""

    def do_GET(self) -> None:
        owner = next((name for name in (*FAULTS, *FILES) if f"/{name}/" in self.path), "missing")
        code, headers, body = *FAULTS.get(owner, (200, {})), b""
        if code == 200 and "/tree/" in self.path:
            body = json.dumps(
                [{"type": "file", "path": n, "size": 1, "oid": "1"} for n in FILES[owner]]
            ).encode()
        elif code == 200 and "/api/" in self.path:
            siblings = [{"rfilename": name} for name in FILES[owner]]
            body = json.dumps({"id": f"{owner}/it", "sha": COMMIT, "siblings": siblings}).encode()
        elif code == 200 and self.path.endswith("model_index.json") and owner in ("pickled", "half"):
            body, headers = json.dumps(INDEX).encode(), {"X-Repo-Commit": COMMIT, "ETag": '"1"'}
        elif code == 200 and owner == THIN:
            name = self.path.split("/resolve/")[1].partition("/")[2]
            body = (BASE / name.replace(".fp16.", ".")).read_bytes()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{name.replace("/", "-")}"'}
        elif code == 200:
            code, headers = 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Silence."""


def half_downloaded(cache: Path, good: Path, owner: str) -> None:
    """The hub's cache as a broken download leaves it: everything but the UNet's weights."""
    folder = cache / f"models--{owner}--it"
    shutil.copytree(good, folder / "snapshots" / COMMIT)
    for weights in (folder / "snapshots" / COMMIT / "unet").glob("*.safetensors"):
        weights.unlink()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)


def told(ask: Callable[[str], object], owner: str) -> str:
    """What is said of `owner`/it."""
    from megaman.common.console import Exit, UserError

    try:
        return f"it was had: {type(ask(f'{owner}/it')).__name__}"
    except UserError as error:
        return str(error) if error.exit_code == Exit.MODEL else f"exit {error.exit_code}: {error}"


def main() -> None:
    """One JSON line."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": home}
        os.environ.pop("HF_HUB_OFFLINE", None)
        from megaman.common import console

        console.quiet_libraries()
        import torch

        from megaman.model import hub, stable_diffusion

        for owner in HALF:
            half_downloaded(Path(home, "hub"), hub.EMBEDDED_FOLDER, owner)
        parts = [
            path for path in hub.EMBEDDED_FOLDER.rglob("*.*") if path.suffix in (".json", ".safetensors")
        ]
        FILES["half"] = [path.relative_to(hub.EMBEDDED_FOLDER).as_posix() for path in parts]
        whole = ["model_index.json", *(path.relative_to(BASE).as_posix() for path in BASE.glob("*/*.*"))]
        FILES[THIN] = [name.replace(".safetensors", ".fp16.safetensors") for name in whole]
        asks = {
            "base": lambda name: stable_diffusion.load_base(
                name, device=torch.device("cpu"), dtype=torch.float32
            ),
            "adapter": hub.download_adapter,
        }
        known = stable_diffusion.peek(f"{THIN}/it")  # before anything else of it is there
        said = {"peek": f"{known.kind.name}, {known.cell_px}, {known.resolution}"}
        said |= {
            f"{what} {owner}": told(ask, owner) for what, ask in asks.items() for owner in (*FAULTS, *FILES)
        }
        server.shutdown()
        server.server_close()
        for what, ask in asks.items():
            said |= {f"{what} {owner}, hub down": told(ask, owner) for owner in ("missing", THIN, *HALF)}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
