"""Encoding a dataset in batches and on several processes: the same numbers, each picture once, one end."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import crop_of

from megaman.common.cache import Store, key_of
from megaman.common.console import UserError
from megaman.data.buckets import Crop
from megaman.model import compute
from megaman.model.stable_diffusion import StableDiffusion, load_base
from megaman.model.weights import digest_of
from megaman.training import encoding
from megaman.training.encoding import Captions, EncodedDataset, encode

CAPTIONS = [["mega man"], ["mega man, red"], ["mega man, blue"], ["mega man, " * 40], ["a robot"]]
WAIT_S = 60


@dataclass
class Group:
    """Two processes' accelerators, of two threads, that meet where objects are gathered."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=WAIT_S))
    said: dict[int, Any] = field(default_factory=dict)
    rank: threading.local = field(default_factory=threading.local)

    def gather(self, facts: list[Any]) -> list[Any]:
        self.said[self.rank.value] = facts[0]
        self.barrier.wait()
        answer = [self.said[0], self.said[1]]
        self.barrier.wait()
        return answer


@dataclass
class Process:
    """As much of an accelerator as encoding asks."""

    process_index: int
    num_processes: int = 2

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0


@pytest.fixture
def on_two(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], Any]], list[Any]]:
    """Runs a function of an accelerator on two processes at once; what it returns, or raises, on each."""
    group = Group()
    monkeypatch.setattr(compute, "gather_object", group.gather)

    def run(work: Callable[[Any], Any], rank: int) -> Any:
        group.rank.value = rank
        try:
            return work(Process(rank))
        except (UserError, SystemExit) as end:
            return end

    def both(work: Callable[[Any], Any]) -> list[Any]:
        with ThreadPoolExecutor(2) as pool:
            return [task.result() for task in [pool.submit(run, work, rank) for rank in (0, 1)]]

    return both


@pytest.fixture
def crops(tmp_path: Path) -> list[list[Crop]]:
    """Four pictures of one size and one of another."""
    (tmp_path / "pictures").mkdir()
    values = (-0.8, -0.3, 0.1, 0.4)
    return [
        *([crop_of(tmp_path / "pictures", value)] for value in values),
        [crop_of(tmp_path / "pictures", 0.9, 64)],
    ]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each picture and each text was encoded."""
    count: Counter[str] = Counter()
    encoded, read = encoding._encoded, encoding._read

    def counted(base: StableDiffusion, crops: list[Crop]) -> list[Any]:
        count.update(crop.key for crop in crops)
        return encoded(base, crops)

    def counted_text(captions: list[str], base: StableDiffusion) -> list[Any]:
        count.update(captions)
        return read(captions, base)

    monkeypatch.setattr(encoding, "_encoded", counted)
    monkeypatch.setattr(encoding, "_read", counted_text)
    return count


def bits(encoded: EncodedDataset) -> list[bytes]:
    tensors = [*encoded.means, *encoded.stds, encoded.text.states, encoded.sizes, encoded.ids]
    return [tensor.numpy().tobytes() for tensor in tensors]


def a_base(folder: Path) -> StableDiffusion:
    base = load_base(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    base.max_chunks = 3
    return base


@pytest.fixture
def bases(tiny_folder: Path) -> list[StableDiffusion]:
    """One for each of two processes."""
    return [a_base(tiny_folder) for _ in range(2)]


@pytest.mark.parametrize("is_kept", [True, False])
def test_two_processes_encode_each_picture_once_and_both_have_all(
    tmp_path: Path, bases: list[StableDiffusion], crops: list[list[Crop]], computed: Counter[str],
    on_two: Callable[[Callable[[Any], Any]], list[Any]], is_kept: bool,
) -> None:  # fmt: skip
    alone = encode(crops, Captions(CAPTIONS), bases[0], Store(None))
    assert set(computed.values()) == {1}
    computed.clear()

    def work(process: Any) -> tuple[list[bytes], int, int]:
        store = Store(tmp_path / "cache" if is_kept else None)
        encoded = encode(crops, Captions(CAPTIONS), bases[process.process_index], store, process)
        return bits(encoded), store.hits, store.misses

    for hits in (0, 11):
        answers = on_two(work)
        assert [answer[0] for answer in answers] == [bits(alone)] * 2
        if is_kept:
            assert [answer[1:] for answer in answers] == [(hits, 11 - hits)] * 2
            assert set(computed.values()) == {1}
    if not is_kept:
        assert set(computed.values()) == {4}  # no process has what another has encoded


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("mishap", "code"),
    [(UserError("as it is", 3), 3), (RuntimeError("CUDA out of memory"), 6)],
    ids=["picture", "memory"],
)
def test_what_one_process_meets_ends_all_with_its_code_and_the_first_says_why(
    bases: list[StableDiffusion], crops: list[list[Crop]], monkeypatch: pytest.MonkeyPatch,
    on_two: Callable[[Callable[[Any], Any]], list[Any]], rank: int, mishap: Exception, code: int,
) -> None:  # fmt: skip
    def fails(*_: object, **__: object) -> None:
        raise mishap

    monkeypatch.setattr(bases[rank].vae, "encode", fails)
    first, second = on_two(
        lambda process: encode(crops, Captions(CAPTIONS), bases[process.process_index], Store(None), process)
    )
    assert isinstance(first, UserError)
    assert first.exit_code == code
    assert ("as it is" if code == 3 else "out of memory") in str(first)
    assert isinstance(second, SystemExit)  # without a word
    assert second.code == code


@pytest.fixture
def batched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card: three of a size at a time."""
    monkeypatch.setattr(encoding, "at_once", lambda device, on_card: 3)


@pytest.mark.usefixtures("batched")
def test_in_batches_the_numbers_are_those_of_single_pictures(
    bases: list[StableDiffusion], crops: list[list[Crop]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    honest = encoding._encoded

    def counted(base: StableDiffusion, part: list[Crop]) -> list[Any]:
        sizes.append([crop.bucket.width for crop in part])
        return honest(base, part)

    monkeypatch.setattr(encoding, "_encoded", counted)
    together = encode(crops, Captions(CAPTIONS), bases[0], Store(None))
    assert sizes == [[32, 32, 32], [32], [64]]
    monkeypatch.undo()
    singly = encode(crops, Captions(CAPTIONS), bases[0], Store(None))
    assert len(together.means) == len(singly.means) == 5
    for a, b in zip(together.means + together.stds, singly.means + singly.stds, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.text.states, singly.text.states, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("batched")
def test_a_batch_is_the_same_whatever_the_cache_holds_of_it(
    tmp_path: Path, bases: list[StableDiffusion], crops: list[list[Crop]], computed: Counter[str]
) -> None:
    """A card's last digits depend on how many it computes at once: so they must always be the same ones."""
    whole = bits(encode(crops, Captions(CAPTIONS), bases[0], Store(tmp_path)))
    vae = digest_of(bases[0].vae)
    (entry,) = tmp_path.rglob(f"{key_of('latents', vae, crops[1][0].key)}.safetensors")
    entry.unlink()
    computed.clear()
    assert bits(encode(crops, Captions(CAPTIONS), bases[0], Store(tmp_path))) == whole
    assert computed == Counter(crop.key for (crop,) in crops[:3])


def test_a_picture_on_a_cpu_is_encoded_alone() -> None:
    assert encoding.at_once(torch.device("cpu"), 16) == 1
    assert encoding.at_once(torch.device("cuda"), 16) == 16
    assert encoding.at_once(torch.device("cuda"), 0) == 1  # larger than what is taken at a time


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch, bases: list[StableDiffusion]) -> Iterator[dict[str, int]]:
    """A VAE with memory for so many pictures."""
    limit = {"pictures": 1}
    honest = bases[0].vae.encode

    def encode_some(pixels: torch.Tensor) -> Any:
        if len(pixels) > limit["pictures"]:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return honest(pixels)

    monkeypatch.setattr(bases[0].vae, "encode", encode_some)
    return limit


@pytest.mark.usefixtures("batched")
def test_where_memory_runs_out_fewer_are_encoded_at_a_time(
    bases: list[StableDiffusion], crops: list[list[Crop]], room: dict[str, int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    few = encode(crops, Captions(CAPTIONS), bases[0], Store(None))
    assert "memory ran out with 3 pictures at a time: 1 now" in capsys.readouterr().err
    room["pictures"] = 3
    for a, b in zip(few.means, encode(crops, Captions(CAPTIONS), bases[0], Store(None)).means, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    room["pictures"] = 0
    with pytest.raises(UserError, match=r"out of memory with one picture .* smaller --resolution") as error:
        encode(crops, Captions(CAPTIONS), bases[0], Store(None))
    assert error.value.exit_code == 6
