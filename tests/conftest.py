"""Real small things for the tests: a tiny Stable Diffusion of diffusers' own classes, a folder of
pictures, the two scripts as a user runs them.
"""

import ctypes
import gc
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may fetch a model
os.environ["XDG_CACHE_HOME"] = os.environ["LOCALAPPDATA"] = tempfile.mkdtemp(prefix="megaman_cache_")
GPUS = os.environ.setdefault("GPUS_OF_THE_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # tests beside each other: who waits lets others work
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bit for bit equality is promised on a CPU

from megaman.common.console import quiet_libraries  # noqa: E402

quiet_libraries()

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_models import save_tiny  # noqa: E402

import megaman_lora  # noqa: E402
from megaman.common.kinds import SD1, SD2, XL, Kind  # noqa: E402
from megaman.data.buckets import (  # noqa: E402
    Bucket,
    Crop,
)
from megaman.model.stable_diffusion import StableDiffusion, load_base  # noqa: E402
from megaman.training import validation  # noqa: E402

# The files that take longest, slowest first. The others follow in their order.
SLOW_FILES = [
    "test_resume.py", "test_kinds.py", "test_train.py", "test_kinds_of_adapters.py", "test_half.py",
    "test_recommend.py", "test_generate.py", "test_faults.py", "test_processes.py", "test_interop.py",
    "test_placement.py", "test_max_minutes.py", "test_validation.py", "test_single_file.py",
]  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Lets xdist hand the files out in that order. It would begin with those of many tests, and leave one of
    two processes alone at the end with files of one slow test.
    """
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the slow files first."""
    ranks = {name: rank for rank, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


def pytest_collection_finish() -> None:
    """Leaves what is imported by now out of every later search for garbage, which takes 0.2 s with it."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def short_previews() -> Iterator[None]:
    """Sample pictures in 2 denoising steps, not 20, which are half of a tiny run; real processes take all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "SAMPLE_STEPS", 2)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """A file that is synced is not waited for: a power cut alone would tell. Processes of their own wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which refuses what is no open file, too
        yield


THREADS = torch.get_num_threads()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """One thread for torch, for which the tiny tensors of the tests are too small to share."""
    torch.set_num_threads(1)


@pytest.fixture
def all_threads() -> Iterator[None]:
    """As many threads for torch as a user's run has, during a test."""
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base on the disk."""
    return save_tiny(SD1, tmp_path_factory.mktemp("base") / "tiny_base")


@pytest.fixture(scope="session")
def tiny_folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    """A tiny base of a kind on the disk, written when somebody asks for it."""
    root = tmp_path_factory.mktemp("kinds")

    @cache
    def folder_of(kind: Kind) -> Path:
        return tiny_folder if kind is SD1 else save_tiny(kind, root / f"tiny_{kind.folder}", blocks=2)

    return folder_of


TEXT = ["--text_encoder_lr", "5e-3"]
KINDS_OF_RUNS: dict[str, tuple[Kind, list[str]]] = {
    "sd1": (SD1, []),
    "sd2": (SD2, []),
    "xl": (XL, []),
    "xl and its encoders, for half of it": (XL, [*TEXT, "--text_encoder_stop", "0.5"]),
}
EVERY_KIND = pytest.mark.parametrize(
    ("base_folder", "more_flags"), KINDS_OF_RUNS.values(), ids=KINDS_OF_RUNS.keys(), indirect=True
)  # runs of `train` and `train_flags` on a tiny base of each kind


@pytest.fixture
def base_folder(request: pytest.FixtureRequest, tiny_folders: Callable[[Kind], Path]) -> Path:
    """The tiny base that a run trains on; of Stable Diffusion 1.x, unless EVERY_KIND names another."""
    return tiny_folders(getattr(request, "param", SD1))


@pytest.fixture
def more_flags(request: pytest.FixtureRequest) -> list[str]:
    """What EVERY_KIND adds to a run's flags."""
    return getattr(request, "param", [])


@pytest.fixture
def tiny_base(tiny_folder: Path) -> StableDiffusion:
    """The tiny base, freshly loaded, float32, on the CPU."""
    return load_base(str(tiny_folder), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="session")
def plain(tiny_folder: Path) -> StableDiffusion:
    """The tiny base, loaded once, never changed: copies of its UNet are adapted."""
    return load_base(str(tiny_folder), device=torch.device("cpu"), dtype=torch.float32)


def crop_of(folder: Path, value: float, side: int = 32) -> Crop:
    """All of a plain grey picture; value in [-1, 1]."""
    level = round((value + 1) * 127.5)
    path = folder / f"{level}.png"
    Image.new("RGB", (side, side), (level, level, level)).save(path)
    return Crop(path, str(level), Bucket(side, side))


def save_pictures(folder: Path) -> Path:
    """Writes six pictures of 40 x 48 px in plain colours, four with captions."""
    folder.mkdir()
    for i, colour in enumerate(("red", "green", "blue", "yellow", "purple", "orange")):
        Image.new("RGB", (40, 48), colour).save(folder / f"megaman_{i}.png")
        if i < 4:
            (folder / f"megaman_{i}.txt").write_text(f"mega man, {colour} background", encoding="utf-8")
    return folder


def flags_of_a_run(base: Path, pictures: Path, output: Path) -> list[str]:
    """A run of four steps."""
    return [
        f"--pretrained_model_name={base}",
        f"--data_dir={pictures}",
        f"--output_dir={output}",
        *[
            "--resolution",
            "32",
            "--max_train_steps",
            "4",
            "--gradient_accumulation_steps",
            "1",
            "--mixed_precision",
            "no",
        ],
        *[
            "--train_batch_size",
            "2",
            "--save_steps",
            "2",
            "--validation_steps",
            "4",
            "--lora_rank",
            "4",
            "--lora_alpha",
            "32",
        ],
        *["--report_to", "none", "--learning_rate", "1e-2"],
    ]


@pytest.fixture
def folder_of_pictures(tmp_path: Path) -> Path:
    """Six pictures of 40 x 48 px in plain colours, four with captions."""
    return save_pictures(tmp_path / "pictures")


@pytest.fixture
def train_flags(
    base_folder: Path, more_flags: list[str], folder_of_pictures: Path, tmp_path: Path
) -> list[str]:
    """A run of four steps on the tiny base that writes to tmp_path/out."""
    return [*flags_of_a_run(base_folder, folder_of_pictures, tmp_path / "out"), *more_flags]


@pytest.fixture(scope="session")
def finished_runs(
    tiny_folders: Callable[[Kind], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Gives the output folder of one of KINDS_OF_RUNS, without further flags, trained once: to read, to copy
    for a change.
    """

    @cache
    def finished_run(name: str) -> Path:
        root = tmp_path_factory.mktemp("finished")
        kind, more_flags = KINDS_OF_RUNS[name]
        flags = flags_of_a_run(tiny_folders(kind), save_pictures(root / "pictures"), root / "out")
        return megaman_lora.train(megaman_lora.read_config([*flags, *more_flags])[0]).parent

    return finished_run


@pytest.fixture(scope="session")
def finished(finished_runs: Callable[[str], Path]) -> Path:
    """The output folder of a run on the base of Stable Diffusion 1.x."""
    return finished_runs("sd1")


@pytest.fixture
def plain_run(request: pytest.FixtureRequest, finished_runs: Callable[[str], Path]) -> Path:
    """The output folder of `train()` on EVERY_KIND's base, as trained once for all tests: to read."""
    return finished_runs(request.node.callspec.id)


@pytest.fixture
def train(train_flags: list[str]) -> Callable[..., Path]:
    """Trains in this process, with further flags, and returns lora_weights/."""

    def run(*flags: str) -> Path:
        return megaman_lora.train(
            megaman_lora.with_init_lora(*megaman_lora.read_config([*train_flags, *flags]))
        )

    return run


@pytest.fixture(scope="session")
def adapter_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """lora_weights/ of a short run on the tiny base at rank 4, alpha 32."""
    root = tmp_path_factory.mktemp("adapter")
    for i, colour in enumerate(("red", "green", "blue")):
        (root / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), colour).save(root / "pictures" / f"{i}.png")
    cfg = megaman_lora.TrainConfig(
        pretrained_model_name=str(tiny_folder),
        data_dir=str(root / "pictures"),
        output_dir=str(root / "out"),
        resolution=32,
        lora_rank=4,
        lora_alpha=32,
        learning_rate=1e-2,
        max_train_steps=5,
        gradient_accumulation_steps=1,
        mixed_precision="no",
        validation_prompt=["mega man"],
        report_to="none",
    )
    return megaman_lora.train(cfg)


DAC_RIGHTS = 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: to read and write whatever a file's mode says


@contextmanager
def bound_by_modes() -> Iterator[None]:
    """Root gives up its right to read and write everywhere for the time, and is bound by modes as anybody."""
    if os.geteuid() != 0:
        yield
        return
    libc, version = ctypes.CDLL(None, use_errno=True), 0x20080522
    header, rights = (ctypes.c_uint32 * 2)(version, 0), (ctypes.c_uint32 * 6)()
    if sys.platform != "linux" or libc.capget(header, rights) != 0:
        pytest.skip("root can't give up its rights here")
    effective = rights[0]
    rights[0] = effective & ~DAC_RIGHTS
    assert libc.capset(header, rights) == 0
    try:
        yield
    finally:
        rights[0] = effective
        libc.capset(header, rights)


def run_script(*arguments: str, cwd: Path = ROOT, timeout_s: int = 240) -> subprocess.CompletedProcess[str]:
    """Runs `python <arguments>` as a user would."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        encoding="utf-8",
    )
