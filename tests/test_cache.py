"""What was worked out once is found again, whole, and never wrongly."""

import os
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import crop_of

from megaman.common.cache import ENTRIES, MARK, Store, default_folder, key_of
from megaman.model.stable_diffusion import StableDiffusion
from megaman.training.encoding import Captions, encode


def made(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a": torch.full((4, 5), value), "b": torch.arange(3.0)}


def must_not_be_made() -> dict[str, torch.Tensor]:
    raise AssertionError("it was there")


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    first = Store(tmp_path)
    first.tensors(key_of("x"), made)
    first.facts(key_of("y"), lambda: {"size": [3, 4]})
    again = Store(tmp_path)
    assert torch.equal(again.tensors(key_of("x"), must_not_be_made)["a"], made()["a"])
    assert again.facts(key_of("y"), must_not_be_made) == {"size": [3, 4]}
    assert (first.hits, first.misses, again.hits, again.misses) == (0, 2, 2, 0)


@pytest.mark.parametrize("kind", ["tensors", "facts"])
def test_a_damaged_entry_is_made_anew_whatever_the_damage(tmp_path: Path, kind: str) -> None:
    rng = random.Random(5)

    def ask(store: Store) -> object:
        if kind == "facts":
            return store.facts(key_of("x"), lambda: {"size": [30, 40], "remarks": ["first of 12 frames"]})
        return {name: tensor.tolist() for name, tensor in store.tensors(key_of("x"), made).items()}

    right = ask(Store(tmp_path))
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != MARK]
    whole = file.read_bytes()
    damages = [b"", whole[: len(whole) // 2], whole[:-1], b"\0" * len(whole)]
    for _ in range(60):
        at = rng.randrange(len(whole))
        damages.append(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
    for damaged in damages:
        file.write_bytes(damaged)
        assert ask(Store(tmp_path)) == right
        assert ask(Store(tmp_path)) == right


def test_keys_tell_everything_apart() -> None:
    parts = [("a", "b"), ("ab", ""), ("a", "b", ""), (b"a", "bb"), (1, 23), (12, 3), ("\ud800",)]
    assert len({key_of(*each) for each in parts}) == len(parts)


def test_the_least_recently_used_entries_go_first(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for i in range(6):
        store.tensors(key_of(i), made)
        (path,) = tmp_path.rglob(f"{key_of(i)}.safetensors")
        os.utime(path, (1000 + i, 1000 + i))
    Store(tmp_path).tensors(key_of(0), must_not_be_made)  # used just now
    size = path.stat().st_size
    assert store.prune(limit_bytes=3 * size) == 3
    for i in (0, 4, 5):
        Store(tmp_path).tensors(key_of(i), must_not_be_made)


def test_nothing_of_the_users_is_deleted_in_a_folder_that_he_named(tmp_path: Path) -> None:
    digest = key_of("the user's")
    theirs = [
        tmp_path / "XL" / "base.safetensors",
        tmp_path / "SD" / "notes.txt",
        tmp_path / "ab" / f"{digest}.safetensors",
        tmp_path / ENTRIES / "ab" / "base.safetensors",
        tmp_path / ENTRIES / "XL" / f"{digest}.ckpt",
        tmp_path / ENTRIES / "notes.txt",
    ]
    store = Store(tmp_path)
    store.tensors(key_of("x"), made)
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    (tmp_path / ENTRIES / "SD").mkdir()
    (tmp_path / ENTRIES / "SD" / f"{digest}.json").symlink_to(theirs[0])
    leftover = tmp_path / ENTRIES / digest[:2] / f".{digest}.json.1a2b.partial"
    leftover.parent.mkdir(parents=True, exist_ok=True)
    leftover.write_text("of a killed process")
    assert store.prune(limit_bytes=0) == 2
    assert [path.read_text() for path in theirs] == ["mine"] * len(theirs)
    assert not leftover.exists()


def test_a_folder_of_the_users_under_our_folders_name_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = key_of("x")
    theirs = tmp_path / ENTRIES / digest[:2] / f"{digest}.safetensors"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    store = Store(tmp_path)
    store.tensors(digest, made)
    store.facts(key_of("y"), lambda: [1])
    assert store.prune(limit_bytes=0) == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [theirs]
    assert theirs.read_text() == "mine"
    told = f"cache: {tmp_path} can't be written to (its {ENTRIES} holds files that are not ours)"
    assert capsys.readouterr().err == f"{told}; nothing new is kept\n"


def test_a_folder_that_cannot_be_written_costs_time_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "cache")
    assert torch.equal(store.tensors(key_of("x"), made)["a"], made()["a"])
    assert store.facts(key_of("y"), lambda: [1]) == [1]
    assert store.prune() == 0


def refused(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_what_another_user_keeps_there_is_read_though_it_cannot_be_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(tmp_path).tensors(key_of("x"), made)
    Store(tmp_path).facts(key_of("y"), lambda: [1])
    monkeypatch.setattr("megaman.common.cache.os.utime", refused)
    monkeypatch.setattr(Path, "unlink", refused)  # Windows refuses it while another process reads
    store = Store(tmp_path)
    store.tensors(key_of("x"), must_not_be_made)
    store.facts(key_of("y"), must_not_be_made)
    assert (store.hits, store.misses) == (2, 0)
    assert store.prune(limit_bytes=0) == 0


def test_a_cache_that_cannot_be_kept_is_said_once_and_still_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Store(tmp_path).facts(key_of("x"), lambda: [1])
    monkeypatch.setattr("megaman.common.files.os.fsync", refused)
    store = Store(tmp_path)
    assert [store.facts(key_of(i), lambda i=i: [i]) for i in range(3)] == [[0], [1], [2]]
    assert store.facts(key_of("x"), must_not_be_made) == [1]
    assert Store(tmp_path).facts(key_of("z"), lambda: [3]) == [3]  # another part of the same run
    told = capsys.readouterr().err
    assert told == f"cache: {tmp_path} can't be written to (Permission denied); nothing new is kept\n"
    assert store.folder == tmp_path


def ask_for_all(folder: Path) -> list[float]:
    return [Store(folder).tensors(key_of(i), lambda i=i: made(i))["a"][0, 0].item() for i in range(30)]


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    with ProcessPoolExecutor(3) as pool:
        answers = list(pool.map(ask_for_all, [tmp_path] * 3))
    assert answers == [[float(i) for i in range(30)]] * 3
    assert not list(tmp_path.rglob("*.partial"))


def test_a_second_encoding_asks_neither_vae_nor_text_encoder(
    tmp_path: Path, tiny_base: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    crops = [[crop_of(tmp_path, 0.3)]]
    first = encode(crops, Captions([["mega man"]]), tiny_base, Store(tmp_path))
    monkeypatch.setattr(tiny_base.vae, "encode", must_not_be_made)
    monkeypatch.setattr(tiny_base.encoders["text_encoder"], "forward", must_not_be_made)
    store = Store(tmp_path)
    again = encode(crops, Captions([["mega man"]]), tiny_base, store)
    assert torch.equal(first.means[0], again.means[0])
    assert torch.equal(first.text.states, again.text.states)
    assert (store.hits, store.misses) == (3, 0)


def test_the_same_weights_in_another_architecture_find_nothing_of_these(
    tmp_path: Path, tiny_base: StableDiffusion
) -> None:
    crops = [[crop_of(tmp_path, 0.3)]]
    encode(crops, Captions([["mega man"]]), tiny_base, Store(tmp_path))
    tiny_base.vae.register_to_config(norm_num_groups=2)
    tiny_base.encoders["text_encoder"].config.hidden_act = "gelu"
    store = Store(tmp_path)
    encode(crops, Captions([["mega man"]]), tiny_base, store)
    assert (store.hits, store.misses) == (0, 3)


def test_other_weights_find_nothing_of_these(tmp_path: Path, tiny_base: StableDiffusion) -> None:
    crops = [[crop_of(tmp_path, 0.3)]]
    encode(crops, Captions([["mega man"]]), tiny_base, Store(tmp_path))
    with torch.no_grad():
        tiny_base.vae.quant_conv.weight[0, 0] += 1
    store = Store(tmp_path)
    encode(crops, Captions([["mega man"]]), tiny_base, store)
    assert (store.hits, store.misses) == (2, 1)


def test_the_cache_lies_where_the_platform_keeps_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    for platform, last in (("linux", "megaman_lora"), ("win32", "Cache"), ("darwin", "megaman_lora")):
        monkeypatch.setattr("megaman.common.cache.sys.platform", platform)
        assert default_folder().name == last


def test_a_folder_that_another_process_begins_just_now_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, other = Path.iterdir, Store(tmp_path)

    def late(folder: Path) -> object:
        monkeypatch.setattr(Path, "iterdir", honest)
        other.facts(key_of("y"), lambda: [1])  # its mark and its first entry, between our two looks
        return honest(folder)

    monkeypatch.setattr(Path, "iterdir", late)
    store = Store(tmp_path)
    store.facts(key_of("x"), lambda: [1])
    assert store.is_writable
