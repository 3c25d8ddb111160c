"""The digest of a base's weights is remembered by their files, and never taken for that of others."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megaman.common.cache import Store
from megaman.model import weights
from megaman.model.stable_diffusion import StableDiffusion, load_base
from megaman.model.weights import Origin, digest_of, remembered_digest

A_MINUTE_NS = 60 * 10**9


def later(origin: Origin) -> Origin:
    """The same files, loaded a minute after they were."""
    return replace(origin, began_ns=origin.began_ns + A_MINUTE_NS)


def base_in(folder: Path, source: Path) -> StableDiffusion:
    """A copy of a base in a folder of its own, loaded a minute after it was written."""
    shutil.copytree(source, folder)
    base = load_base(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    assert base.origin is not None
    base.origin = later(base.origin)
    return base


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The modules of which every byte was hashed."""
    seen: list[Any] = []
    monkeypatch.setattr(weights, "digest_of", lambda module: (seen.append(module), digest_of(module))[1])
    return seen


def test_a_digest_is_remembered_and_is_the_right_one(
    tmp_path: Path, tiny_folder: Path, hashed: list[Any]
) -> None:
    base = base_in(tmp_path / "base", tiny_folder)
    parts = {"vae": base.vae, **base.encoders}
    for _ in range(2):
        for part, module in parts.items():
            store = Store(tmp_path / "cache")
            assert remembered_digest(module, part, base.origin, store) == digest_of(module)
            assert (store.hits, store.misses) == (0, 0)  # which count encodings
    assert hashed == [*parts.values()]


def test_a_digest_is_what_it_always_was() -> None:
    """The keys of what users' caches hold are made of it; the number is of the version that began them."""

    class Model(nn.Module):
        config = {"width": 3, "_class_name": "Model", "transformers_version": "5.0"}  # noqa: RUF012

    model = Model()
    model.register_buffer("a", torch.arange(6.0).reshape(2, 3))
    model.register_buffer("b", torch.ones(2, dtype=torch.bfloat16))
    assert digest_of(model) == "b4e7213ceee2e36195532632ae5bd43dcd4ac001ecdad45a92adaef7ea0b123d"


def test_a_file_that_is_changed_in_place_is_hashed_anew_though_size_and_time_are_the_same(
    tmp_path: Path, tiny_folder: Path, hashed: list[Any]
) -> None:
    base, store = base_in(tmp_path / "base", tiny_folder), Store(tmp_path / "cache")
    remembered_digest(base.vae, "vae", base.origin, store)
    (file,) = (tmp_path / "base" / "vae").glob("*.safetensors")
    before = file.stat()
    with file.open("rb+") as stream:
        stream.seek(before.st_size // 2)
        stream.write(b"\1")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert base.origin is not None
    remembered_digest(base.vae, "vae", later(base.origin), store)
    assert len(hashed) == 2


def test_other_weights_in_memory_are_other_weights_whatever_their_file(
    tmp_path: Path, tiny_folder: Path
) -> None:
    base, store = base_in(tmp_path / "base", tiny_folder), Store(tmp_path / "cache")
    before = remembered_digest(base.vae, "vae", base.origin, store)
    with torch.no_grad():
        base.vae.quant_conv.weight[0, 0] += 1
    after = remembered_digest(base.vae, "vae", base.origin, store)
    assert after == digest_of(base.vae) != before


def test_files_that_may_have_changed_since_loading_began_are_not_trusted(
    tmp_path: Path, tiny_folder: Path, hashed: list[Any]
) -> None:
    base, store = base_in(tmp_path / "base", tiny_folder), Store(tmp_path / "cache")
    (file,) = (tmp_path / "base" / "vae").glob("*.safetensors")
    written_ns = file.stat().st_ctime_ns
    for began_ns in (written_ns - 1, written_ns + weights.UNSURE_NS - 1):
        origin = Origin(tmp_path / "base", began_ns)
        assert origin.identity("vae") is None
        for _ in range(2):
            remembered_digest(base.vae, "vae", origin, store)
    assert len(hashed) == 4
    assert Origin(tmp_path / "base", written_ns + weights.UNSURE_NS).identity("vae") is not None


def test_a_link_that_leads_elsewhere_is_another_file(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    link = tmp_path / "vae" / "model.safetensors"
    identities = set()
    for name in ("blob_1", "blob_2"):
        (tmp_path / name).write_bytes(b"the same")
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / name)
        identity = later(Origin(tmp_path)).identity("vae")
        assert identity is not None
        assert str((tmp_path / name).resolve()) in identity
        identities.add(identity)
    assert len(identities) == 2
    (tmp_path / "blob_2").unlink()
    assert later(Origin(tmp_path)).identity("vae") is None


def test_every_shard_counts_and_a_single_file_holds_all_parts(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    for number in (1, 2):
        (tmp_path / "unet" / f"model-{number}.safetensors").write_bytes(b"x")
    origin = later(Origin(tmp_path))
    before = origin.identity("unet")
    (tmp_path / "unet" / "model-2.safetensors").write_bytes(b"xx")
    assert origin.identity("unet") not in (before, None)
    assert origin.identity("vae") is None
    single = later(Origin(tmp_path / "unet" / "model-1.safetensors"))
    assert single.identity("unet") == single.identity("vae") is not None
