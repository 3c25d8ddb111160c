"""Captions from the pictures: what taggers and captioners see, which of it becomes a caption, and where."""

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import captioners
import commands
import numpy as np
import pytest
import torch
from captioners import noise_picture, save_blip, save_florence, save_git, save_tagger
from commands import exit_code_of
from PIL import Image
from safetensors.torch import load_file, save_file

from megaman.common.console import UserError, one_line
from megaman.config.record import recorded
from megaman.config.train import TrainConfig
from megaman.data import tags
from megaman.data.caption_set import PICTURES
from megaman.data.pictures import load_image
from megaman.model import hub, tagger
from megaman.model.captioner import Captioner
from megaman.model.tagger import Look, Tagger, pixels_of
from megaman.training.captioning import open_model

HALF = (0.5, 0.5, 0.5)
CPU = torch.device("cpu")
SEEN = (
    *(("general", 9, 0.9), ("sensitive", 9, 0.4), ("blue_eyes", 0, 0.6), ("solo", 0, 0.9), ("^_^", 0, 0.5)),
    *(("rockman_(character)", 4, 0.9), ("forte_(mega_man)", 4, 0.8), ("hat", 0, 0.34), ("mega_man", 0, 0.7)),
)


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tagger that sees the same in every picture: SEEN."""
    return save_tagger(tmp_path_factory.mktemp("taggers") / "steady", SEEN)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioner."""
    return save_blip(tmp_path_factory.mktemp("captioners") / "blip")


# ---------------------------------------------------------------- pixels
def test_a_picture_is_padded_to_a_white_square_and_its_blue_comes_first() -> None:
    picture = Image.new("RGB", (2, 1))
    picture.putdata([(255, 0, 0), (0, 51, 255)])
    look = Look(2, 1.0, HALF, HALF, Image.Resampling.BICUBIC)
    blue, green, red = pixels_of(picture, look)
    assert torch.allclose(red, torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
    assert torch.allclose(green, torch.tensor([[-1.0, -0.6], [1.0, 1.0]]))
    assert torch.allclose(blue, torch.tensor([[-1.0, 1.0], [1.0, 1.0]]))


def test_an_odd_margin_leaves_the_wider_white_behind() -> None:
    look = Look(4, 1.0, HALF, HALF, Image.Resampling.BICUBIC)
    rows = pixels_of(Image.new("RGB", (4, 1)), look)[0, :, 0]
    assert rows.tolist() == [1, -1, 1, 1]


def test_mean_and_std_belong_to_red_green_and_blue_in_this_order() -> None:
    look = Look(1, 1.0, (0.1, 0.2, 0.3), (0.5, 0.25, 0.2), Image.Resampling.BICUBIC)
    pixel = pixels_of(Image.new("RGB", (1, 1), (255, 51, 102)), look).flatten()
    assert torch.allclose(pixel, torch.tensor([(0.4 - 0.3) / 0.2, 0.0, (1 - 0.1) / 0.5]), atol=1e-6)


def test_a_tagger_that_looks_at_a_part_sees_the_middle() -> None:
    picture = Image.new("RGB", (8, 8), "white")
    picture.paste((0, 0, 0), (2, 2, 6, 6))
    look = Look(4, 0.5, HALF, HALF, Image.Resampling.NEAREST)
    assert (pixels_of(picture, look) == -1).all()


def test_scaling_is_bicubic_over_the_padded_square() -> None:
    picture = noise_picture(5, (40, 24))
    square = Image.new("RGB", (40, 40), "white")
    square.paste(picture, (0, 8))
    wanted = np.asarray(square.resize((32, 32), Image.Resampling.BICUBIC), np.float32)[:, :, ::-1]
    look = Look(32, 1.0, HALF, HALF, Image.Resampling.BICUBIC)
    seen = pixels_of(picture, look).permute(1, 2, 0).numpy()
    assert np.allclose(seen, wanted / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (57, 31), (9, 40), (1, 5)])
def test_pixels_are_those_of_timms_own_transforms(size: tuple[int, int]) -> None:
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        pytest.skip(f"timm's transforms need torchvision, which can't be imported ({str(error)[:50]})")
    captioners.imported_timm()
    from timm.data import create_transform, resolve_data_config

    for share in (1.0, 0.875):
        said = captioners.ARCHITECTURE["pretrained_cfg"] | {"crop_pct": share, "std": [0.5, 0.25, 0.2]}
        square = Image.new("RGB", (max(size), max(size)), "white")
        picture = noise_picture(1, size)
        square.paste(picture, ((max(size) - size[0]) // 2, (max(size) - size[1]) // 2))
        wanted = create_transform(**resolve_data_config({}, pretrained_cfg=said))(square)[[2, 1, 0]]
        assert torch.equal(pixels_of(picture, Look.of({"pretrained_cfg": said})), wanted)


def test_a_tagger_gives_the_scores_of_timms_own_model(tmp_path: Path) -> None:
    timm = captioners.imported_timm()
    folder = save_tagger(tmp_path / "free", [(f"tag_{number}", 0, None) for number in range(6)])
    pictures = [noise_picture(1), noise_picture(2, (24, 24))]
    told = open_model(str(folder)).load(CPU)(pictures)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=6, **captioners.ARCHITECTURE["model_args"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    look = Look(32, 1.0, HALF, HALF, Image.Resampling.BICUBIC)
    with torch.no_grad():
        scores = model.eval()(torch.stack([pixels_of(picture, look) for picture in pictures])).sigmoid()
    for seen, row in zip(told, scores.tolist(), strict=True):
        wanted = sorted(
            ((f"tag_{number}", score) for number, score in enumerate(row) if score >= 0.05),
            key=lambda each: -each[1],
        )
        assert [(tag, round(score, 5)) for tag, _, score in seen] == [(t, round(s, 5)) for t, s in wanted]
    assert told[0] != told[1]


def test_what_is_transparent_looks_white_to_a_tagger(tmp_path: Path) -> None:
    folder = save_tagger(tmp_path / "free", [(f"tag_{number}", 0, None) for number in range(4)])
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    read = open_model(str(folder)).load(CPU)
    assert read([load_image(tmp_path / "clear.png")]) == read([Image.new("RGB", (20, 20), "white")])


# ---------------------------------------------------------------- which tags
def test_ratings_go_characters_need_more_and_the_surest_tag_comes_first() -> None:
    assert tags.chosen_tags(SEEN, 0.35, ()) == [
        *("solo", "mega man", "blue eyes", "^_^"),
        "rockman (character)",
    ]
    assert tags.chosen_tags(SEEN, 0.6, tags.listed_tags("SOLO, Mega_Man ,")) == [
        "blue eyes",
        "rockman (character)",
    ]
    assert "hat" in tags.chosen_tags(SEEN, 0.34, ())
    assert tags.chosen_tags(SEEN, 0.95, ()) == []
    assert tags.chosen_tags([("Blue_Hat", 0, 0.9)], 0.35, tags.listed_tags("blue hat")) == []


def test_a_tag_is_spelled_with_spaces_unless_it_is_a_face() -> None:
    faces = ["^_^", ">_<", "o_o", "(o)_(o)", "0_0", "||_||", "@_@", "=_=", ">_o"]
    assert [tags.spelled(face) for face in faces] == faces
    assert tags.spelled("blue_eyes") == "blue eyes"
    assert tags.chosen_tags([("a_b,c", 0, 0.9)], 0.35, ()) == []  # would be two tags


def test_tags_on_more_than_nine_of_ten_pictures_are_the_characters() -> None:
    pictures = [["helmet", "cannon"]] * 9 + [["helmet", "beach"]]
    assert tags.tags_of_the_character(pictures) == {"helmet": 10}
    assert tags.tags_of_the_character([*pictures, ["cannon"]]) == {"helmet": 10, "cannon": 10}
    assert tags.tags_of_the_character(pictures[:5]) == {"cannon": 5, "helmet": 5}
    assert tags.tags_of_the_character(pictures[:4]) == {}


def test_the_trigger_comes_first_and_once() -> None:
    assert tags.caption_of_tags("mega  man", ["solo", "Mega man", "hat"]) == "mega man, solo, hat"
    assert tags.caption_of_tags("mega man", []) == "mega man"
    assert tags.caption_of_sentence("mega man", "a robot\n on sand ") == "mega man, a robot on sand"
    assert tags.caption_of_sentence("mega man", "Mega man runs") == "Mega man runs"
    assert tags.caption_of_sentence("mega", "megaphones") == "mega, megaphones"
    assert tags.caption_of_sentence("mega man", "") == "mega man"


# ---------------------------------------------------------------- captioners
@pytest.mark.parametrize(
    ("save", "asked"), [(save_blip, {}), (save_git, {}), (save_florence, {"text": ["<DETAILED_CAPTION>"]})]
)
def test_a_captioner_says_what_transformers_own_classes_say(
    save: Callable[[Path], Path], asked: dict[str, list[str]], tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = save(tmp_path / "model")
    model = open_model(str(folder))
    assert isinstance(model, Captioner)
    picture = noise_picture(1)
    (said,) = model.load(CPU)([picture])
    own = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=[picture], return_tensors="pt", **asked)
    ids = own.generate(**inputs, num_beams=3, do_sample=False, max_new_tokens=120)
    assert said == one_line(" ".join(processor.batch_decode(ids, skip_special_tokens=True)[0].split())) != ""


# ---------------------------------------------------------------- the command
Ran = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def dry_run(
    train_flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Ran:
    """Runs --dry_run on six pictures, of which four have captions: the exit code, and the lines told."""

    def ran(*more: object) -> tuple[int, list[str]]:
        flags = [*train_flags, "--cache_dir", str(tmp_path / "cache"), "--dry_run", *map(str, more)]
        capsys.readouterr()
        code = exit_code_of(commands.training, ["megaman_lora.py", *flags], monkeypatch)
        return code, capsys.readouterr().err.splitlines()

    return ran


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


class Words(HTMLParser):
    """A page's words."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.words = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_data(self, data: str) -> None:
        self.words += f" {' '.join(data.split())}"


def test_pictures_without_a_caption_get_one_and_the_users_folder_stays(
    dry_run: Ran, steady: Path, folder_of_pictures: Path, tmp_path: Path
) -> None:
    (folder_of_pictures / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    before = contents_of(folder_of_pictures)
    code, lines = dry_run("--caption_with", steady, "--caption_without", "solo")
    assert code == 0
    assert any(line.startswith("skipped: torn.png: ") for line in lines)
    assert contents_of(folder_of_pictures) == before
    offered = tmp_path / "out" / "captions"
    caption = b"mega man, blue eyes, ^_^, rockman (character)\n"
    texts = {name: data for name, data in contents_of(offered).items() if name != PICTURES}
    assert texts == {"megaman_4.txt": caption, "megaman_5.txt": caption}
    assert f"captions: {steady}, a tagger of 9 tags, looks at 2 pictures on cpu" in lines
    assert "captions: 4 pictures with a caption of your own, which stays as it is" in lines
    assert any(line.startswith(f"captions made from the pictures lie in {offered}: ") for line in lines)
    words = Words(tmp_path / "out" / "dataset.html").words
    assert words.count("From the picture: mega man, blue eyes, ^_^, rockman (character)") == 2
    assert words.count("mega man (from the name)") == 2
    assert f"Made by {steady.name} for 2 pictures" in words


def test_a_second_look_asks_the_store_and_replaces_nothing_of_the_users(
    dry_run: Ran, steady: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = tmp_path / "out" / "captions"
    assert dry_run()[0] == 0  # captions from names lie there now, which are ours
    (offered / "megaman_5.txt").write_text("mine", encoding="utf-8")
    assert dry_run("--caption_with", steady)[0] == 0
    assert (offered / "megaman_4.txt").read_text("utf-8").startswith("mega man, solo, blue eyes")
    assert (offered / "megaman_5.txt").read_text("utf-8") == "mine"
    monkeypatch.setattr(Tagger, "load", lambda *_: pytest.fail("it was read before"))
    code, lines = dry_run("--caption_with", steady, "--caption_threshold", "0.8")
    assert code == 0
    assert any(line.endswith("looks at 0 pictures on cpu; 2 were looked at before") for line in lines)
    kept = f"2 captions of an earlier dry run left as found in {offered}; delete those that you want anew"
    assert kept in lines
    assert "From the picture: mega man, solo, rockman" in Words(tmp_path / "out" / "dataset.html").words


def test_pruning_counts_all_pictures_and_tells_what_goes(dry_run: Ran, steady: Path, tmp_path: Path) -> None:
    code, lines = dry_run("--caption_with", steady, "--prune_tags", "--caption_threshold", "0.59")
    assert code == 0
    pruned = "mega man (6), rockman (character) (6), solo (6)"
    assert f"captions: pruned, on more than 90 % of 6 pictures: blue eyes (6), {pruned}" in lines
    assert "note: 2 captions of the trigger alone (megaman_4.png, megaman_5.png)" in lines
    assert (
        "Pruned, since they are on more than 90 % of the pictures"
        in Words(tmp_path / "out" / "dataset.html").words
    )


def test_edited_captions_are_put_beside_pictures_that_have_none(
    dry_run: Ran, steady: Path, folder_of_pictures: Path, tmp_path: Path
) -> None:
    dry_run("--caption_with", steady)
    offered = tmp_path / "out" / "captions"
    (offered / "megaman_4.txt").write_bytes("mega man, 我的".encode("utf-16"))
    (folder_of_pictures / "megaman_5.txt").write_bytes(b"")  # the user's, if empty
    before = contents_of(folder_of_pictures)
    code, lines = dry_run("--write_captions")
    assert code == 0
    assert f"1 caption written beside the pictures in {folder_of_pictures}" in lines
    assert f"1 caption file left as found in {folder_of_pictures}: megaman_5.txt" in lines
    after = contents_of(folder_of_pictures)
    assert after == before | {"megaman_4.txt": (offered / "megaman_4.txt").read_bytes()}
    assert "mega man, 我的" in " ".join(Words(tmp_path / "out" / "dataset.html").words for _ in [dry_run()])


def test_captions_of_another_folder_are_not_put_beside_pictures_of_the_same_names(
    dry_run: Ran, steady: Path, folder_of_pictures: Path, tmp_path: Path
) -> None:
    dry_run("--caption_with", steady)
    for name in ("megaman_4.png", "megaman_5.png"):  # others, under the same names
        Image.new("RGB", (40, 48), "green").save(folder_of_pictures / name)
    before = contents_of(folder_of_pictures)
    for flags in (("--write_captions",), ("--caption_with", steady, "--write_captions")):
        code, lines = dry_run(*flags)
        assert code == 0
        assert f"0 captions written beside the pictures in {folder_of_pictures}" in lines
        assert any("2 captions" in line and "made for other pictures" in line for line in lines)
    assert contents_of(folder_of_pictures) == before


def test_captions_from_names_are_never_made_and_put_there_in_one_command(
    dry_run: Ran, folder_of_pictures: Path, tmp_path: Path
) -> None:
    before = contents_of(folder_of_pictures)
    code, lines = dry_run("--write_captions")
    assert code == 0
    assert any(line.startswith(f"no captions lie in {tmp_path / 'out' / 'captions'} yet") for line in lines)
    assert contents_of(folder_of_pictures) == before


def test_what_was_edited_before_a_run_is_put_there_after_it(
    dry_run: Ran, folder_of_pictures: Path, tmp_path: Path
) -> None:
    dry_run()
    output = tmp_path / "out"
    (output / "captions" / "megaman_4.txt").write_text("mega man, my edit", encoding="utf-8")
    settings = recorded(TrainConfig(output_dir=str(output), data_dir=str(folder_of_pictures)))
    (output / "training_config.json").write_text(json.dumps(settings), encoding="utf-8")  # a run began there
    assert dry_run("--write_captions")[0] == 0
    assert (folder_of_pictures / "megaman_4.txt").read_text(encoding="utf-8") == "mega man, my edit"


def test_a_written_caption_speaks_for_no_picture_that_has_one_in_a_list(
    dry_run: Ran, steady: Path, folder_of_pictures: Path
) -> None:
    Image.new("RGB", (40, 48), "pink").save(folder_of_pictures / "megaman_4.jpg")
    entry = {"file_name": "megaman_4.png", "text": "mega man, listed"}
    (folder_of_pictures / "metadata.jsonl").write_text(json.dumps(entry), encoding="utf-8")
    assert dry_run("--caption_with", steady, "--write_captions")[0] == 0
    written = {name for name in contents_of(folder_of_pictures) if name.startswith("megaman_4")}
    assert written == {"megaman_4.png", "megaman_4.jpg", "megaman_4.jpg.txt"}


def test_sentences_become_captions_and_take_no_flags_of_tags(
    dry_run: Ran, blip: Path, tmp_path: Path
) -> None:
    code, lines = dry_run("--caption_with", blip)
    assert code == 0
    caption = (tmp_path / "out" / "captions" / "megaman_4.txt").read_text(encoding="utf-8")
    assert caption.startswith("mega man, ")
    assert len(caption.split()) > 3
    for flags in (["--prune_tags"], ["--caption_without", "solo"], ["--caption_threshold", "0.5"]):
        code, lines = dry_run("--caption_with", blip, *flags)
        assert (code, len([line for line in lines if line.startswith("error: ")])) == (2, 1)
        assert f"{flags[0]}: {blip} is a captioner (blip): it writes sentences and knows no tags" in lines[-1]


def test_where_every_picture_has_a_caption_no_weights_are_loaded(
    dry_run: Ran, steady: Path, folder_of_pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (4, 5):
        (folder_of_pictures / f"megaman_{number}.txt").write_text("mega man, mine", encoding="utf-8")
    monkeypatch.setattr(Tagger, "load", lambda *_: pytest.fail("there is nothing to look at"))
    code, lines = dry_run("--caption_with", steady, "--prune_tags")
    assert code == 0
    told = [line for line in lines if line.startswith("captions: ")]
    assert told == ["captions: every picture has a caption of your own, which stays as it is; none was made"]


# ---------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"caption_with": "a/b"}, "--caption_with a/b: captions are made with --dry_run; add it"),
        ({"write_captions": True}, "--write_captions: must be given with --dry_run"),
        ({"prune_tags": True, "dry_run": True}, "--prune_tags: must be given with --caption_with"),
        (
            {"caption_threshold": 0.5, "dry_run": True},
            "--caption_threshold: must be given with --caption",
        ),
        ({"caption_without": "a", "dry_run": True}, "--caption_without: must be given with --caption_with"),
        (
            {"caption_with": "a/b", "dry_run": True, "caption_threshold": 0.0},
            "--caption_threshold 0.0: must",
        ),
    ],
)
def test_a_flag_that_means_nothing_alone_is_refused(flags: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError) as error:
        TrainConfig(**flags)
    assert str(error.value).startswith(complaint)
    assert error.value.exit_code == 2


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def holding(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def without_words(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink()


def as_onnx(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.onnx")


def as_other_weights(folder: Path) -> None:
    save_file({"head.weight": torch.zeros(9, 4)}, folder / "model.safetensors")


TABLE, CONFIG = "selected_tags.csv", "config.json"


def harmed(model: Path, folder: Path, harm: Callable[[Path], object]) -> Path:
    """A copy of a model's folder that something has happened to."""
    shutil.copytree(model, folder)
    harm(folder)
    return folder


def refused(folder: Path, complaint: str, dry_run: Ran) -> None:
    """Checks that a model's folder is refused in one line that says why."""
    code, lines = dry_run("--caption_with", folder)
    assert code == 4
    assert complaint in lines[-1]
    assert lines[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (without("model.safetensors"), "has no model.safetensors. Name a tagger of timm"),
        (as_onnx, "is an ONNX tagger, which is not read"),
        (without(CONFIG), "its config.json is missing or damaged"),
        (holding(CONFIG, b"{"), "its config.json is missing or damaged"),
        (holding(CONFIG, b'{"model_type": "vit"}'), "its config.json names no architecture of timm"),
        (holding(CONFIG, b'{"architecture": "vit_tiny_patch16_224"}'), "its config.json makes no sense"),
        (
            holding(TABLE, b"tag_id,name,category\n1,solo\n"),
            "no table of tags with the columns name and",
        ),
        (holding(TABLE, b"\xff\xfe\x00"), "no table of tags with the columns name and category"),
        (holding(TABLE, b"a,b\n1,2\n"), "no table of tags with the columns name and category"),
        (holding(TABLE, b"name,category\nsolo,x\n"), "no table of tags with the columns name and category"),
        (holding(TABLE, b"name,category\n"), "holds no tag"),
        (holding(TABLE, b"name,category\nsolo,0\n \x1b,0\n"), "row 3 holds no tag"),
        (holding(TABLE, b"name,category\nsolo,0\n"), "holds 1 tags, and the model knows 9"),
        (holding("model.safetensors", b"torn"), "this tagger can't be loaded"),
        (as_other_weights, "this tagger can't be loaded"),
    ],
)
def test_a_broken_tagger_is_one_line(
    harm: Callable[[Path], object], complaint: str, steady: Path, tmp_path: Path, dry_run: Ran
) -> None:
    refused(harmed(steady, tmp_path / "broken", harm), complaint, dry_run)


def test_scores_that_are_no_numbers_are_refused(tmp_path: Path, dry_run: Ran) -> None:
    folder = save_tagger(tmp_path / "nan", [("solo", 0, 0.5)])
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"head.bias": torch.full((1,), torch.nan)}, folder / "model.safetensors")
    code, lines = dry_run("--caption_with", folder)
    assert (code, lines[-1]) == (5, f"error: {folder}: gives scores that are no numbers. Copy it again.")


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (without("model.safetensors"), "no .safetensors weights there; pickle files"),
        (holding("model.safetensors", b"torn"), "this captioner can't be loaded"),
        (
            without_words,
            "no tokenizer there (tokenizer.json, vocab.txt, vocab.json, *.model). Fetch it whole",
        ),
        (without(CONFIG), "neither a tagger nor a captioner"),
        (holding(CONFIG, b"[]"), "neither a tagger nor a captioner"),
        (holding(CONFIG, b'{"model_type": "llava"}'), "is a 'llava', no captioner that is read (blip, git"),
        (holding(CONFIG, b'{"model_type": "blip", "auto_map": {}}'), "wants to run code of its own"),
    ],
)
def test_a_broken_captioner_is_one_line(
    harm: Callable[[Path], object], complaint: str, blip: Path, tmp_path: Path, dry_run: Ran
) -> None:
    refused(harmed(blip, tmp_path / "broken", harm), complaint, dry_run)


def test_a_captioner_of_which_weights_are_missing_is_not_made_up(
    blip: Path, tmp_path: Path, dry_run: Ran
) -> None:
    folder = tmp_path / "half"
    folder.mkdir()
    for file in blip.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("projection.weight"))
    save_file(
        {key: value for key, value in weights.items() if key != name},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    code, lines = dry_run("--caption_with", folder)
    assert code == 4
    assert f"its weights lack {name}" in lines[-1]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (
            "SmilingWolf/wd-vit-tagger-v3",
            "the hub can't be reached and this caption model is not on",
        ),
        ("./nowhere", "no such folder; name one, or a hub id. Check --caption_with."),
        ("model.safetensors", "no such folder; name one, or a hub id. Check --caption_with."),
        ("https://example.com/x", "an address of another site than the Hugging Face hub"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(name: str, complaint: str, dry_run: Ran) -> None:
    code, lines = dry_run("--caption_with", name)
    assert code == 4
    assert complaint in lines[-1]
    assert lines[-1].startswith("error: ")


def hub_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets the hub have these files under every name; returns what is fetched of them, as it happens."""
    fetched: list[str] = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        assert name == "somebody/model"
        here = folder.parent / "snapshot"
        here.mkdir(exist_ok=True)
        for file in sorted(folder.iterdir()):
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                fetched.append(file.name)
                (here / file.name).write_bytes(file.read_bytes())
        return str(here)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    return fetched


def test_of_the_hub_small_files_come_first_and_weights_only_of_what_is_read(
    steady: Path, tmp_path: Path, dry_run: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    for file in steady.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.onnx").write_bytes(b"large")
    fetched = hub_of(folder, monkeypatch)
    assert dry_run("--caption_with", "https://huggingface.co/somebody/model")[0] == 0
    small = ["config.json", "selected_tags.csv"]
    assert fetched == [*small, "config.json", "model.safetensors", "selected_tags.csv"]
    fetched.clear()
    (folder / "selected_tags.csv").unlink()
    (tmp_path / "snapshot" / "selected_tags.csv").unlink()
    (folder / "config.json").write_text('{"model_type": "llava"}', encoding="utf-8")
    code, lines = dry_run("--caption_with", "somebody/model")
    assert (code, fetched) == (4, ["config.json"])
    assert lines[-1].startswith("error: somebody/model: is a 'llava', no captioner that is read")


@pytest.mark.parametrize("is_installed", [False, True])
def test_without_timm_a_line_says_what_to_type(
    is_installed: bool, steady: Path, dry_run: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str) -> object:
        if is_installed:
            raise RuntimeError("operator torchvision::nms does not exist")
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    monkeypatch.setattr(tagger.importlib, "import_module", fails)
    code, lines = dry_run("--caption_with", steady)
    assert code == 2
    problem = (
        "can't be loaded (operator torchvision::nms does not exist)" if is_installed else "is not installed"
    )
    needs = "error: --caption_with: a tagger needs the package timm, which"
    assert lines[-1] == f"{needs} {problem}; pip install -r requirements_megaman_lora.txt timm"


def test_no_run_remembers_how_captions_were_made() -> None:
    flags = {"caption_with": "a/b", "caption_threshold": 0.5, "caption_without": "solo", "prune_tags": True}
    cfg = TrainConfig(dry_run=True, write_captions=True, **flags)
    assert recorded(cfg) == recorded(TrainConfig())
