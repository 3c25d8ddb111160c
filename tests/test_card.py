"""What an adapter tells of itself: the fields that other tools show, correct hashes, nothing private."""

import base64
import getpass
import hashlib
import io
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_interop import trained

import megaman_lora
from megaman.common.kinds import SD1
from megaman.config.record import published
from megaman.config.train import FACTS, TrainConfig
from megaman.lora.adapter import Adapter, LoraLayer
from megaman.lora.injection import adapter_of
from megaman.lora.save import write_adapter, write_kohya
from megaman.model.hub import model_hashes
from megaman.model.stable_diffusion import StableDiffusion


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """lora_weights/ of a run with repeats, every private flag set and a picture drawn at its end."""
    root = tmp_path_factory.mktemp("card")
    for i, colour in enumerate(("red", "green", "blue", "yellow", "purple", "orange")):
        picture = root / "private pictures" / ("3_secret name" if i == 5 else ".") / f"megaman_{i}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 48), colour).save(picture)
        picture.with_suffix(".txt").write_text(f"mega man, {colour} background", encoding="utf-8")
    cfg = megaman_lora.TrainConfig(
        pretrained_model_name=str(tiny_folder),
        data_dir=str(root / "private pictures"),
        output_dir=str(root / "out"),
        cache_dir=str(root / "cache"),
        logging_dir=str(root / "logs"),
        resolution=32,
        lora_rank=4,
        lora_alpha=32,
        lora_targets="conv",
        learning_rate=1e-2,
        max_train_steps=2,
        gradient_accumulation_steps=1,
        mixed_precision="no",
        report_to="none",
    )
    return megaman_lora.train(cfg)


def test_the_fields_that_web_uis_show_are_those_of_the_run(run: Path) -> None:
    told = metadata_of(run / "megaman_lora.safetensors")
    assert told["ss_output_name"] == told["modelspec.title"] == "megaman_lora"
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("4", "32.0")
    assert told["ss_network_module"] == "networks.lora"
    assert json.loads(told["ss_network_args"]) == {"conv_dim": 4, "conv_alpha": 32.0}
    assert told["modelspec.trigger_phrase"] == told["ss_trigger_words"] == "mega man"
    assert told["ss_sd_model_name"] == "tiny_base"
    assert told["ss_steps"] == told["ss_max_train_steps"] == "2"
    assert told["ss_learning_rate"] == told["ss_unet_lr"] == "0.01"
    assert told["ss_num_train_images"] == "8"
    assert json.loads(told["ss_dataset_dirs"]) == {
        "1_mega man": {"n_repeats": 1, "img_count": 5},
        "3_mega man": {"n_repeats": 3, "img_count": 1},
    }
    tags = json.loads(told["ss_tag_frequency"])
    assert tags["1_mega man"]["mega man"] == 5
    assert tags["1_mega man"]["red background"] == 1
    (bucket,) = json.loads(told["ss_bucket_info"])["buckets"].values()
    assert bucket["count"] == 6
    assert len(bucket["resolution"]) == 2
    ours = json.loads(told["megaman"])["config"]
    assert (ours["lora_targets"], ours["seed"], ours["learning_rate"]) == ("conv", 42, 0.01)
    assert all(isinstance(value, str) for value in told.values())
    assert "ss_base_model_version" not in told  # the tiny base is no Stable Diffusion 1.x


def test_stable_diffusion_1_is_said_in_the_words_that_forge_and_a1111_test_for(tmp_path: Path) -> None:
    about = {"base": "stable-diffusion-v1-5/stable-diffusion-v1-5", "text_width": 768, "trigger": "mega man"}
    layer = LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    write_kohya(Adapter({("unet", "a.to_q"): layer}, about), tmp_path / "a.safetensors")
    told = metadata_of(tmp_path / "a.safetensors")
    assert told["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert (told["ss_base_model_version"], told["ss_v2"]) == ("sd_v1", "False")


@pytest.mark.parametrize("side", [4, 1024])
def test_the_hashes_are_those_that_others_compute(tmp_path: Path, side: int) -> None:
    layer = LoraLayer(torch.rand(side, side), torch.rand(side, side), 1.0)  # 32 KB, and 4 MB: past 0x110000
    path = tmp_path / "a.safetensors"
    write_kohya(Adapter({("unet", "a.to_q"): layer}), path)
    told, whole = metadata_of(path), path.read_bytes()
    digest = hashlib.sha256(whole[8 + int.from_bytes(whole[:8], "little") :]).hexdigest()
    assert told["sshs_model_hash"] == digest
    assert told["modelspec.hash_sha256"] == "0x" + digest
    assert told["sshs_legacy_hash"] == hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8]
    assert torch.equal(load_file(path)["lora_unet_a_to_q.lora_up.weight"], layer.up.half())


def test_a_single_file_bases_hashes_are_told_and_a_folders_are_not(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    path.write_bytes(bytes(range(256)) * 5000)
    whole = path.read_bytes()
    assert model_hashes(path) == {
        "ss_sd_model_hash": hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8],
        "ss_new_sd_model_hash": hashlib.sha256(whole).hexdigest(),
    }
    assert model_hashes(tmp_path) == {}


def test_nothing_names_a_path_or_the_user(run: Path) -> None:
    private = [str(run.parents[1]), "secret name", "private pictures", "data_dir", "cache_dir", "logging_dir"]
    for file in run.iterdir():
        content = file.read_bytes()
        assert not [word for word in private if word.encode() in content], file
        if len(getpass.getuser()) > 4:
            assert getpass.getuser().encode() not in content
    paths = {name: f"/somewhere/mine/{name}" for name, facts in FACTS.items() if facts.is_path}
    shown = published(TrainConfig(**paths, seed=0, dry_run=True))
    assert "/somewhere" not in json.dumps(shown)
    assert {name for name in paths if name in shown} == {"init_lora", "pretrained_model_name"}
    assert (shown["init_lora"], shown["seed"], "dry_run" in shown) == ("init_lora", 0, False)


def test_the_last_sample_is_preview_and_thumbnail(run: Path) -> None:
    sample = run.parent / "samples" / "step-000002" / "01.png"
    assert (run / "megaman_lora.preview.png").read_bytes() == sample.read_bytes()
    kind, _, data = metadata_of(run / "megaman_lora.safetensors")["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert max(picture.size) <= 256
        assert picture.format == "JPEG"


def test_a1111s_card_activates_the_trigger(run: Path) -> None:
    card = json.loads((run / "megaman_lora.json").read_text(encoding="utf-8"))
    assert card["activation text"] == "mega man"
    assert card["preferred weight"] == 1.0
    assert {"description", "sd version", "negative text", "notes"} <= card.keys()


def test_the_model_card_tells_trigger_settings_and_every_tool(run: Path) -> None:
    card = (run / "README.md").read_text(encoding="utf-8")
    for words in (
        "**mega man**",
        "| rank, alpha | 4, 32 |",
        "| lora_targets | conv |",
        "<lora:megaman_lora:1>",
    ):
        assert words in card
    for tool in ("A1111", "Forge", "SD.Next", "ComfyUI", "InvokeAI", "kohya", "diffusers", "PEFT"):
        assert tool in card
    assert "This is a DoRA" not in card
    header = card.split("---")[1]
    assert 'instance_prompt: "mega man"' in header
    assert "base_model:" not in header  # a local base is no hub id
    snippet = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    for code in snippet:
        compile(code, "card", "exec")


def test_a_doras_card_says_who_applies_it_exactly(plain: StableDiffusion, tmp_path: Path) -> None:
    live = trained(plain, lora_rank=4, lora_alpha=32, use_dora=True)
    about = {"trigger": "mega `man`\n---\n# x", "base": "owner/model", "config": {}}
    write_adapter(adapter_of({"unet": live}, SD1, about), tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "This is a DoRA" in card
    assert "in every tool." not in card
    assert 'base_model: "owner/model"' in card
    assert "\n# x" not in card  # a trigger is a word, never markup
    assert (
        json.loads(metadata_of(tmp_path / "megaman_lora.safetensors")["ss_network_args"])["dora_wd"] == "True"
    )
