"""A folder of pictures as the training sees it, and what the user is told before anything costs time."""

import hashlib
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import commands
import pytest
import torch
from commands import exit_code_of
from conftest import bound_by_modes, run_script
from PIL import Image
from test_pictures import KINDS, png_of

import megaman_lora
from megaman.common.cache import Store
from megaman.common.console import UserError
from megaman.config.train import DataFlags
from megaman.data import scan
from megaman.data.buckets import Bucket
from megaman.data.folder import look_into
from megaman.data.pictures import BadPicture, Picture
from megaman.model.stable_diffusion import peek
from megaman_lora import MegaManDataset, report_of, sampler_of


def test_the_dataset_works_without_a_model(folder_of_pictures: Path) -> None:
    dataset = MegaManDataset(str(folder_of_pictures), None)
    assert len(dataset) == 6
    assert dataset[0].caption == "mega man, red background"
    assert dataset[5].caption == "mega man"
    assert dataset[0].pixels.shape == (3, 576, 448)
    assert dataset[0].ids is None


def test_the_dataset_tokenizes_when_it_has_a_tokenizer(folder_of_pictures: Path, tiny_base: object) -> None:
    dataset = MegaManDataset(
        folder_of_pictures, tiny_base.tokenizer, DataFlags(resolution=32, crop="center"), cell_px=4
    )
    ids = dataset[0].ids
    assert ids.shape == (77,)
    assert tiny_base.tokenizer.decode(ids, skip_special_tokens=True) == "mega man , red background"
    assert dataset[0].pixels.shape == (3, 32, 32)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Wide, tall and small pictures, in kohya's folders too, and one that is no picture."""
    folder = tmp_path / "mixed"
    for name, size in {
        "wide.png": (200, 100),
        "tall.png": (100, 200),
        "small.png": (20, 20),
        "3_megaman/a.png": (120, 120),
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = sum(map(ord, name))
        noise = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(seed))
        Image.fromarray(noise.byte().numpy()).resize(size).save(path)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "wide.txt").write_text("mega man, blue, running, sky", encoding="utf-8")
    (folder / "tall.txt").write_text("a boss <b>& friends</b>", encoding="utf-8")
    (folder / "small.txt").write_text("mega man, " + "word " * 90, encoding="utf-8")
    return folder


def test_pictures_of_many_shapes_are_trained_in_theirs_and_repeat_as_their_folder_says(mixed: Path) -> None:
    dataset = MegaManDataset(mixed, None, DataFlags(resolution=64), cell_px=16)
    shapes = {path.name: bucket for path, bucket in zip(dataset.paths, dataset.buckets, strict=True)}
    assert shapes == {
        "wide.png": Bucket(80, 48), "tall.png": Bucket(48, 80),
        "small.png": Bucket(64, 64), "a.png": Bucket(64, 64),
    }  # fmt: skip
    assert dict(zip([path.name for path in dataset.paths], dataset.repeats, strict=True))["a.png"] == 3
    stream = sampler_of(dataset, 4)
    assert (len(stream), [len(bucket) for bucket in stream.buckets]) == (6, [1, 4, 1])
    for index, bucket in enumerate(dataset.buckets):
        assert dataset[index].pixels.shape == (3, bucket.height, bucket.width)


def test_flip_and_random_crop_give_several_views_and_only_then(mixed: Path) -> None:
    def views(**settings: object) -> list[torch.Tensor]:
        dataset = MegaManDataset(mixed, None, DataFlags(resolution=64, **settings), cell_px=16)
        return [view.pixels() for view in dataset.crops([p.name for p in dataset.paths].index("wide.png"))]

    (plain,) = views()
    assert len(views(crop="center")) == 1
    straight, mirrored = views(flip=True)
    assert torch.equal(straight, plain)
    assert torch.equal(mirrored, plain.flip(2))
    crops = views(crop="random")
    assert len(crops) == 4
    assert len({crop.numpy().tobytes() for crop in crops}) == 4
    assert all(torch.equal(a, b) for a, b in zip(crops, views(crop="random"), strict=True))


def test_whatever_changes_a_views_pixels_changes_its_key(mixed: Path) -> None:
    pixels_of: dict[str, bytes] = {}
    for settings in (
        *({}, {"flip": True}, {"crop": "center"}, {"crop": "random"}, {"crop": "random", "flip": True}),
        *({"resolution": 128}, {"trigger": "zero"}),
    ):
        dataset = MegaManDataset(mixed, None, DataFlags(**{"resolution": 64} | settings), cell_px=16)
        for view in (view for index in range(len(dataset)) for view in dataset.crops(index)):
            pixels = view.pixels().numpy().tobytes()
            assert pixels_of.setdefault(view.key, pixels) == pixels, settings


def test_the_report_tells_how_pictures_are_cut_and_that_they_are_mirrored(
    mixed: Path, tmp_path: Path
) -> None:
    told = report_of(dataset_of(mixed, crop="random", flip=True))
    assert "sizes: 64x64 (4), cut at random places, also mirrored" in told.lines()
    page = told.write(tmp_path).read_text(encoding="utf-8")
    assert "cut at random places, the frame is in the middle · also mirrored" in page
    assert "exchanged" not in page
    (mixed / "wide.txt").write_text("mega man, facing left")
    told = report_of(dataset_of(mixed, crop="center", flip=True))
    assert (
        "sizes: 64x64 (4), cut in the middle, also mirrored, left and right exchanged in 1 caption"
        in told.lines()
    )
    page = told.write(tmp_path).read_text(encoding="utf-8")
    assert "· also mirrored, left and right exchanged in 1 caption" in page
    assert not report_of(dataset_of(mixed)).sides_exchanged
    assert "sizes: 64x64 (4), cut in the middle" in report_of(dataset_of(mixed, crop="center")).lines()


def test_shuffled_tags_keep_the_first_ones_in_place(mixed: Path) -> None:
    settings = DataFlags(resolution=64, shuffle_tags=True)
    dataset = MegaManDataset(mixed, None, settings, cell_px=16)
    texts = dataset.texts([p.name for p in dataset.paths].index("wide.png"))
    assert len(texts) == 4
    assert len(set(texts)) > 1
    for text in texts:
        assert text.startswith("mega man, ")
        assert sorted(text.split(", ")) == ["blue", "mega man", "running", "sky"]


def test_the_report_names_what_a_user_would_want_to_know(mixed: Path, tiny_base: object) -> None:
    settings = DataFlags(resolution=64, max_tokens=75)
    dataset = MegaManDataset(mixed, tiny_base.tokenizer, settings, cell_px=16)
    text = "\n".join(report_of(dataset).lines())
    assert "pictures: 4 in" in text
    assert "3 captions from files, 1 from names" in text
    assert "sizes: 48x80 (1), 64x64 (2), 80x48 (1)" in text
    assert "skipped: broken.png: " in text
    assert "captions: from names: 3_megaman/a.png “mega man”" in text
    assert "1 picture smaller than the training size, enlarged to it (at most 3.2 times: small.png)" in text
    assert "1 caption longer than 75 tokens; what is over is not read (small.png)" in text
    assert "1 caption without the trigger 'mega man', which learns nothing from there (tall.png)" in text
    assert not re.search(r"\b1 \w+s\b", text.partition("\n")[2])  # "1 pictures"


def test_the_trigger_counts_as_words_of_its_own_and_not_inside_of_others(folder_of_pictures: Path) -> None:
    (folder_of_pictures / "megaman_0.txt").write_text("a hammer", encoding="utf-8")
    (folder_of_pictures / "megaman_1.txt").write_text("the Mm, running", encoding="utf-8")
    told = report_of(dataset_of(folder_of_pictures, trigger="mm"))
    assert [picture.name for picture in told.without_trigger] == [
        "megaman_0.png",
        "megaman_2.png",
        "megaman_3.png",
    ]


def opened(flags: list[str]) -> MegaManDataset:
    """The dataset that a command trains on."""
    cfg, _ = megaman_lora.read_config(flags)
    return megaman_lora.open_dataset(cfg, peek(cfg.pretrained_model_name))


def dataset_of(folder: Path, **settings: object) -> MegaManDataset:
    """The folder as the demo's base sees it."""
    tokenizer = peek("megaman/tiny_sd").tokenizer
    settings = {"pretrained_model_name": "megaman/tiny_sd", "resolution": 64} | settings
    return MegaManDataset(folder, tokenizer, DataFlags(**settings), cell_px=16)


def noise(path: Path, size: tuple[int, int] = (64, 64)) -> Path:
    """A picture unlike any other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 90).convert("RGB").save(path)
    return path


def test_the_report_tells_what_of_the_folder_is_not_trained_on_and_why(tmp_path: Path) -> None:
    for name in ("img/10_mega man/a.png", "reg/1_robot/b.png", "@eaDir/c.png", "log/d.png"):
        noise(tmp_path / name)
    (tmp_path / "img" / "10_mega man" / "typo.txt").write_text("mega man")
    (tmp_path / "img" / "captions.json").write_text("{}")
    told = report_of(dataset_of(tmp_path))
    assert [picture.name for picture in told.pictures] == ["img/10_mega man/a.png"]
    for line in (
        "left out: @eaDir/ (a NAS's thumbnails)",
        "left out: reg/ (regularisation pictures, which are not the character)",
        "left out: log/ (kohya's log)",
        f"note: {tmp_path} is kohya's project folder, and its pictures lie deeper: --data_dir {tmp_path}/img",
        "note: 2 texts that no picture has for a caption: img/10_mega man/typo.txt, img/captions.json",
    ):
        assert line in told.lines()
    assert "regularisation pictures, which" in told.html()


def test_several_concepts_that_would_share_the_trigger_are_told(tmp_path: Path) -> None:
    for name in ("10_hero man/a.png", "5_other girl/b.png", "5_other girl/c.png"):
        noise(tmp_path / name)
    told = "\n".join(report_of(dataset_of(tmp_path)).lines())
    note = (
        "2 concepts of kohya's folders (hero man, other girl): captions from names call them all 'mega man'"
    )
    assert note in told
    for name in ("5_other girl/b.txt", "5_other girl/c.txt"):
        (tmp_path / name).write_text("a girl")
    assert "concepts of kohya's" not in "\n".join(report_of(dataset_of(tmp_path)).lines())


def test_a_picture_of_which_much_is_cut_away_is_named_with_the_remedy(tmp_path: Path) -> None:
    noise(tmp_path / "pano.png", (900, 100))
    noise(tmp_path / "photo.png", (150, 100))
    told = "\n".join(report_of(dataset_of(tmp_path, crop="center")).lines())
    assert "note: 1 picture with more than a third cut off (at most 89%: pano.png); cut out by hand" in told
    assert "or take --crop bucket" in told
    told = "\n".join(report_of(dataset_of(tmp_path)).lines())
    assert "1 picture with more than a third cut off" in told  # no bucket is so wide
    assert "take --crop bucket" not in told
    assert "cut off" not in "\n".join(report_of(dataset_of(tmp_path, crop="random")).lines())


def test_a_caption_of_several_sentences_is_drawn_one_at_a_time(tmp_path: Path) -> None:
    noise(tmp_path / "a.png")
    noise(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("mega man runs.\nmega man is blue.\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "mega man, from the list"}\n')
    dataset = dataset_of(tmp_path)
    assert dataset.texts(0) == ["mega man runs.", "mega man is blue."]
    assert dataset.texts(1) == ["mega man, from the list"]
    told = report_of(dataset)
    assert "pictures: 2 in" in told.lines()[0]
    assert "2 captions from files, 0 from names" in told.lines()[0]
    note = "note: 1 caption of several lines, each a caption of its own: every draw takes one (a.png)"
    assert note in told.lines()
    assert "mega man runs. | mega man is blue." in told.html()
    shuffled = dataset_of(tmp_path, shuffle_tags=True).texts(0)
    assert sorted(set(shuffled)) == ["mega man is blue.", "mega man runs."]
    before = dataset.fingerprint
    (tmp_path / "a.txt").write_text("mega man runs.\nmega man is red.\n")
    assert dataset_of(tmp_path).fingerprint != before


def test_all_that_is_wrong_with_a_folder_is_named_in_one_go(tmp_path: Path) -> None:
    noise(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(UserError) as error:
        dataset_of(tmp_path)
    assert [line.split(": ")[0] for line in str(error.value).splitlines()] == [
        *(str(tmp_path / "b.png"), str(tmp_path / "a.txt")),
    ]


def test_the_report_groups_look_alikes_and_names_the_first_pictures_of_each_remark(tmp_path: Path) -> None:
    for i in range(7):
        Image.new("RGBA", (64, 64), (255, 0, 0, 51)).save(tmp_path / f"{i}.png")
    Image.new("RGB", (128, 64), (255, 204, 204)).save(tmp_path / "wide.png")
    told = report_of(dataset_of(tmp_path))
    assert [[row.name for row in group] for group in told.alike] == [[f"{i}.png" for i in range(7)]]
    text = "\n".join(told.lines())
    assert "note: look alike: 0.png, 1.png, 2.png, 3.png, 4.png, …" in text
    assert "note: 7 pictures: transparency laid on white (0.png, 1.png, 2.png, 3.png, 4.png, …)" in text


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_a_name_of_any_bytes_breaks_neither_the_report_nor_the_page(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in (b"\xff\x1b[31m\n.png", b"\xff<b>.webp"):
        Image.new("RGB", (64, 64), "red").save(os.path.join(os.fsencode(data), name), "PNG")
    (data / "\r\x1b.gif").write_bytes(b"GIF89a")
    result = run_script(
        *("megaman_lora.py", "--data_dir", str(data), "--output_dir", str(tmp_path / "out"), "--dry_run"),
        *("--pretrained_model_name", "megaman/tiny_sd", "--resolution", "64"),
    )
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stderr
    ours = ("pictures", "sizes", "captions", "skipped", "note", "plan", "dry run")
    assert all(line.startswith(ours) for line in result.stderr.splitlines()), result.stderr
    page = (tmp_path / "out" / "dataset.html").read_text(encoding="utf-8")
    assert Page(page).tags.count("i") == 2
    (data / "\r\x1b\n.txt").write_bytes(b"caf\xe9")
    (data / "\r\x1b\n.png").write_bytes((data / os.fsdecode(b"\xff<b>.webp")).read_bytes())
    with pytest.raises(UserError) as caught:
        dataset_of(data, strict=True)
    assert [line.isprintable() for line in str(caught.value).splitlines()] == [True, True]
    assert "\\udcff&lt;b&gt;.webp" in page


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("src", "href") or (value or "").startswith("data:image/webp;base64,")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_every_picture_and_no_caption_becomes_markup(
    mixed: Path, tmp_path: Path, tiny_base: object
) -> None:
    dataset = MegaManDataset(mixed, tiny_base.tokenizer, DataFlags(resolution=64), cell_px=16)
    report = report_of(dataset)
    page = Page(report.write(tmp_path / "out").read_text(encoding="utf-8"))
    assert page.tags.count("img") == 4
    assert "b" in page.tags
    assert "a boss <b>& friends</b>" in page.text
    assert "enlarged 3.2 times" in page.text
    assert "3 times an epoch" in page.text


def test_captions_from_names_are_offered_once_and_then_left_to_the_user(mixed: Path, tmp_path: Path) -> None:
    offered, told = tmp_path / "captions", report_of(dataset_of(mixed))
    (line,) = told.offer_captions(offered)
    assert line.startswith(f"captions made from names lie in {offered}")
    assert [path.relative_to(offered).as_posix() for path in offered.rglob("*.txt")] == ["3_megaman/a.txt"]
    assert (offered / "3_megaman" / "a.txt").read_text(encoding="utf-8") == "mega man\n"
    (offered / "3_megaman" / "a.txt").write_text("mine", encoding="utf-8")
    (line,) = told.offer_captions(offered)
    assert line == f"1 caption of an earlier dry run left as found in {offered}"
    assert (offered / "3_megaman" / "a.txt").read_text(encoding="utf-8") == "mine"


def tree_of(folder: Path) -> str:
    """Names, bytes and times of everything below a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        facts = path.stat()
        total.update(f"{path.relative_to(folder)} {facts.st_mtime_ns} {facts.st_mode}".encode())
        total.update(path.read_bytes() if path.is_file() else b"")
    return total.hexdigest()


def exit_codes_of_every_command(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Trains, looks, draws and fails in several ways on root/data with the base in root/base."""
    work = Path(tempfile.mkdtemp(dir=root))
    training = [
        *("megaman_lora.py", "--data_dir", str(root / "data"), "--pretrained_model_name", str(root / "base")),
        *("--output_dir", str(work / "out"), "--cache_dir", str(work / "cache"), "--resolution", "32"),
        *("--max_train_steps", "1", "--train_batch_size", "2", "--validation_steps", "1"),
        *("--report_to", "none", "--mixed_precision", "no"),
    ]
    drawing = [
        *("generate_megaman.py", "--lora_path", str(work / "out" / "lora_weights"), "--prompts", "mega man"),
        *(
            "--base_model",
            str(root / "base"),
            "--output_dir",
            str(work / "gen"),
            "--num_inference_steps",
            "1",
        ),
    ]
    ways = (
        ["--dry_run"],
        [],
        ["--dry_run"],
        ["--strict"],
        ["--resolution", "33"],
        ["--shuffle_tags", "--flip"],
    )
    codes = [exit_code_of(commands.training, [*training, *flags], monkeypatch) for flags in ways]
    codes.append(exit_code_of(commands.training, [*training, "--pretrained_model_name", "./no"], monkeypatch))
    return [*codes, exit_code_of(commands.drawing, drawing, monkeypatch)]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="users and modes of POSIX")
def test_no_command_changes_the_users_folder_and_none_needs_to_write_there(
    tiny_folder: Path, folder_of_pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder_of_pictures / "broken.png").write_bytes(b"no picture")
    (folder_of_pictures / "sub.png").mkdir()
    expected = [0, 0, 0, 3, 2, 0, 4, 0]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        shutil.copytree(tiny_folder, root / "base")
        shutil.copytree(folder_of_pictures, root / "data")
        before = tree_of(root / "data")
        assert exit_codes_of_every_command(root, monkeypatch) == expected
        assert tree_of(root / "data") == before
        for path in (root / "data", *(root / "data").rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = tree_of(root / "data")
        with bound_by_modes():
            with pytest.raises(PermissionError):
                (root / "data" / "x").touch()
            assert exit_codes_of_every_command(root, monkeypatch) == expected
        assert tree_of(root / "data") == before
        (root / "data").chmod(0o755)
        (root / "data" / "sub.png").chmod(0o755)


def test_a_folder_of_every_kind_of_file_trains_on_all_that_can_be_read_and_names_the_rest(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "kinds"
    folder.mkdir()
    for name, (content, *_) in KINDS.items():
        (folder / name).write_bytes(content)
    refused = {
        "zero.png": (b"", "empty file"),
        "cut.png": (KINDS["plain.png"][0][:60], "damaged: "),
        "cut.jpg": (KINDS["plain.jpg"][0][:-30], "damaged: "),
        "zeros.webp": (bytes(99), "nothing but zeros where a picture begins"),
        "moving.gif": (b"GIF89a" + bytes(20), "a GIF with a damaged beginning"),
        "phone.jpg": (b"\0\0\0\x18ftypheic" + bytes(20), "a HEIC, which is not read"),
        "bomb.png": (png_of((60_000, 60_000), 8, 0, b""), "over the limit of 64 megapixels"),
    }
    for name, (content, _) in refused.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    (folder / "dangling.png").symlink_to("nowhere")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "around").symlink_to(folder)
    train("--data_dir", str(folder), "--train_batch_size", "8", "--validation_steps", "99")
    told = capsys.readouterr().err
    assert f"pictures: {len(KINDS)} in" in told
    for name, (_, reason) in refused.items():
        assert f"skipped: {name}: {reason}" in told
    for line in (
        "folder.png: a folder with a picture's name",
        "dangling.png: a link to a file that",
        "loop.png: a link that leads",
    ):
        assert f"skipped: {line}" in told
    assert "skipped: around: a link to a folder, which is not followed" in told
    assert told.count("skipped: ") == len(refused) + 4


def test_a_dry_run_trains_nothing_and_the_real_run_follows_it(
    train_flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = exit_code_of(commands.training, ["megaman_lora.py", *train_flags, "--dry_run"], monkeypatch)
    told = capsys.readouterr().err
    assert code == 0, told
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["captions", "dataset.html"]
    assert "nothing was trained" in told
    assert "plan: 4 steps of 2 pictures" in told
    (out / "captions" / "megaman_5.txt").write_text("mega man, orange, edited", encoding="utf-8")
    megaman_lora.train(megaman_lora.read_config(train_flags)[0])
    assert (out / "lora_weights").is_dir()
    assert (out / "captions" / "megaman_5.txt").read_text() == "mega man, orange, edited"


def test_strict_makes_skipped_files_errors_and_names_them_with_all_else_that_is_wrong(
    train_flags: list[str],
    folder_of_pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ended(*flags: str) -> int:
        return exit_code_of(commands.training, ["megaman_lora.py", *train_flags, *flags], monkeypatch)

    (folder_of_pictures / "broken.png").write_bytes(b"no picture")
    (folder_of_pictures / "anim.gif").write_bytes(b"GIF89a")
    (folder_of_pictures / "megaman_0.txt").write_bytes(b"caf\xe9")
    assert ended("--strict") == 3
    told = capsys.readouterr().err
    for words in (
        "anim.gif: a GIF with a damaged beginning",
        "broken.png: not a picture",
        "--strict",
        "not UTF-8 at byte 3",
    ):
        assert words in told
    (folder_of_pictures / "megaman_0.txt").write_text("mega man", encoding="utf-8")
    assert ended("--strict", "--dry_run") == 3
    assert ended("--dry_run") == 0


def test_a_dry_run_leaves_a_finished_runs_files_alone(
    finished: Path, train_flags: list[str], tmp_path: Path
) -> None:
    before = tree_of(shutil.copytree(finished, tmp_path / "out"))
    megaman_lora.show_dataset(megaman_lora.read_config([*train_flags, "--dry_run", "--trigger", "zero"])[0])
    shown = tmp_path / "out" / "dry_run"
    assert "zero" in (shown / "dataset.html").read_text(encoding="utf-8")
    assert (shown / "captions" / "megaman_5.txt").is_file()
    shutil.rmtree(shown)
    assert tree_of(tmp_path / "out") == before


@pytest.mark.parametrize("flag", ["output_dir", "cache_dir", "logging_dir"])
def test_nothing_may_be_written_among_the_users_pictures(
    flag: str, train_flags: list[str], folder_of_pictures: Path
) -> None:
    before = tree_of(folder_of_pictures)
    flags = [*train_flags, f"--{flag}", str(folder_of_pictures / "sub" / "x")]
    for ending in ([], ["--dry_run"]):
        with pytest.raises(UserError, match=f"--{flag} .*never written to") as caught:
            opened([*flags, *ending])
        assert caught.value.exit_code == 2
    assert tree_of(folder_of_pictures) == before


def test_a_second_run_encodes_nothing(
    train: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--cache_dir", str(tmp_path / "cache"))
    first, second = train(*flags), None
    told = re.findall(r"cache: (\d+) of (\d+) encodings", capfd.readouterr().err)
    second = train(*flags)
    assert told == [("0", "12")]  # six pictures; four captions, one made from two names, the empty one
    hits, asked = re.findall(r"cache: (\d+) of (\d+) encodings", capfd.readouterr().err)[0]
    assert hits == asked == "12"
    assert first.exists()
    assert second.exists()


def test_a_missing_folder_is_an_error(tmp_path: Path, train_flags: list[str]) -> None:
    with pytest.raises(UserError, match="no such folder"):
        MegaManDataset(tmp_path / "nowhere", None, store=Store(None))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="no such folder"):
        opened([*train_flags, "--data_dir", str(tmp_path / "loop")])


def test_facts_are_remembered_by_content_and_not_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    MegaManDataset(folder, None, store=Store(tmp_path / "cache"))
    os.rename(folder / "a.png", folder / "b.png")
    store = Store(tmp_path / "cache")
    MegaManDataset(folder, None, store=store)
    assert (store.hits, store.misses) == (1, 0)
    Image.new("RGB", (9, 8), "red").save(folder / "b.png")
    store = Store(tmp_path / "cache")
    assert MegaManDataset(folder, None, store=store).scanned[0].size == (9, 8)
    assert (store.hits, store.misses) == (0, 1)


# ---------------------------------------------------------------- several pictures at a time


def test_pictures_that_are_decoded_at_once_keep_their_order_and_their_reasons(tmp_path: Path) -> None:
    for number in range(12):
        if number % 5 == 2:
            (tmp_path / f"{number:02}.png").write_bytes(b"no picture")
        else:
            Image.new("RGB", (10 + number, 20), (20 * number, 0, 0)).save(tmp_path / f"{number:02}.png")
    filters = list(warnings.filters)
    scanned, skipped = scan.scan(look_into(tmp_path), Store(None))
    good = [number for number in range(12) if number % 5 != 2]
    assert [(picture.path.stem, picture.size[0]) for picture in scanned] == [
        (f"{number:02}", 10 + number) for number in good
    ]
    assert [each.path.stem for each in skipped] == ["02", "07"]
    assert all(each.reason == "not a picture; save it as PNG" for each in skipped)
    assert warnings.filters == filters


def test_a_picture_that_lacked_memory_beside_others_is_read_again_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        Image.new("RGB", (10 + number, 20)).save(tmp_path / f"{number}.png")
    honest, crowded = scan.open_picture, {"1.png"}

    def starved(path: Path) -> Picture:
        if path.name in crowded:
            crowded.remove(path.name)
            raise BadPicture(path, "not enough memory to decode it; shrink it first")
        return honest(path)

    monkeypatch.setattr(scan, "open_picture", starved)
    scanned, skipped = scan.scan(look_into(tmp_path), Store(None))
    assert ([picture.path.name for picture in scanned], skipped) == (["0.png", "1.png", "2.png"], [])


def test_what_the_cache_knows_of_a_picture_is_not_decoded_again_and_new_ones_are_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, honest = [], scan.open_picture
    monkeypatch.setattr(scan, "open_picture", lambda path: (decoded.append(path.name), honest(path))[1])
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (10 + number, 20)).save(tmp_path / "pictures" / f"{number}.png")
        scan.scan(look_into(tmp_path / "pictures"), Store(tmp_path / "cache"))
    assert decoded == ["0.png", "1.png", "2.png"]
