"""Captions from the pictures: which model is meant, what it sees, and what is told of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from PIL.Image import Image
from tqdm import tqdm
from transformers import CLIPTokenizer

from megaman.common.cache import Store, key_of
from megaman.common.console import Exit, UserError, count, listed, say
from megaman.config.train import TrainConfig, set_for_tags
from megaman.data import tags
from megaman.data.pictures import load_image
from megaman.data.report import Report, TrainedPicture
from megaman.data.tags import MadeCaption, MadeCaptions
from megaman.model import hub
from megaman.model.captioner import Captioner
from megaman.model.compute import pick_device
from megaman.model.memory import BatchLimit
from megaman.model.tagger import TAGS, Tagger
from megaman.training.encoding import at_once

ON_A_CARD = 8  # pictures at a time
WHAT, FLAG = "caption model", "--caption_with"
SMALL_FILES = ("*.json", "*.csv", "*.txt", "*.model")  # that tell what a model is
NO_ROOM = "make room on the card, or hide it (CUDA_VISIBLE_DEVICES=) to use the CPU. What was read is kept."


def open_model(name: str) -> Tagger | Captioner:
    """The model that is meant by a folder or a hub id, told by its small files; its weights are there, and
    not loaded. UserError (exit 4) if there is none, (exit 2) if a package is missing.
    """
    is_local = hub.is_local(name)
    name = name if is_local else hub.hub_id_of(name)
    folder = (
        _local_folder(Path(name).expanduser()) if is_local else hub.fetched(name, SMALL_FILES, WHAT, FLAG)
    )
    kind = Tagger if (folder / TAGS).exists() else Captioner
    model = kind.open(name, folder)
    if not is_local:
        hub.fetched(name, [*SMALL_FILES, model.weights], WHAT, FLAG)
    model.check_weights()
    return model


def _local_folder(path: Path) -> Path:
    if not path.is_dir():
        problem = "a file; name the folder that it lies in" if path.exists() else "no such folder; name one"
        raise UserError(f"{path}: {problem}, or a hub id. Check {FLAG}.", Exit.MODEL)
    return path


def with_captions_from_pictures(
    report: Report, cfg: TrainConfig, store: Store, tokenizer: CLIPTokenizer
) -> Report:
    """The report with a caption for each picture that has none of its own, as --caption_with makes them; the
    same report without that flag. Tells what came of it. UserError as `open_model` raises it.
    """
    if cfg.caption_with is None:
        return report
    model = open_model(cfg.caption_with)
    if not model.are_tags:
        _refuse_tag_flags(cfg, model)
    wanted = report.captioned_from_name
    looked_at = report.pictures if cfg.prune_tags and wanted else wanted
    seen = _read(model, looked_at, store)
    texts, pruned = _texts(cfg, model, seen)
    by_picture = {
        picture.name: MadeCaption(text := texts[picture.name], len(tokenizer(text).input_ids) - 2)
        for picture in wanted
    }
    made = MadeCaptions(hub.canonical_name(cfg.caption_with), by_picture, pruned, model.are_tags)
    for line in _lines(report, cfg, made, len(looked_at)):
        say(line)
    return replace(report, made=made)


def _refuse_tag_flags(cfg: TrainConfig, model: Tagger | Captioner) -> None:
    for name in set_for_tags(cfg):
        reason = f"{model.name} is {model.title}: it writes sentences and knows no tags"
        raise UserError(f"--{name}: {reason}. Leave it out, or name a tagger.", Exit.USAGE)


def _read(model: Tagger | Captioner, pictures: Sequence[TrainedPicture], store: Store) -> dict[str, Any]:
    """What the model tells of each picture, by the picture's name: from the store, or it is asked."""
    seen_by = model.key if pictures else ""
    keys = {picture.name: key_of("caption", seen_by, picture.scanned.digest) for picture in pictures}
    new = [picture for picture in pictures if not store.holds_facts(keys[picture.name])]
    device = pick_device()
    known = f"; {len(pictures) - len(new)} were looked at before" if len(new) < len(pictures) else ""
    if pictures:
        looks = f"looks at {count(len(new), 'picture')} on {device}{known}"
        say(f"captions: {model.name}, {model.title}, {looks}")
    limit = BatchLimit(NO_ROOM)

    @cache
    def read() -> Callable[[Sequence[Image]], list[Any]]:
        return model.load(device)

    def ask(batch: Sequence[TrainedPicture]) -> list[Any]:
        images = [load_image(picture.scanned.path) for picture in batch]
        return limit.drawn(images, read(), 1)

    def ask_alone(picture: TrainedPicture) -> Any:
        return ask([picture])[0]

    told: dict[str, Any] = {}
    at_a_time = at_once(device, ON_A_CARD)
    with tqdm(total=len(new), desc="captions", unit="picture", dynamic_ncols=True, disable=None) as bar:
        for start in range(0, len(new), at_a_time):
            batch = new[start : start + at_a_time]
            for picture, answer in zip(batch, ask(batch), strict=True):
                told[picture.name] = answer
                store.facts(keys[picture.name], partial(told.get, picture.name))
            bar.update(len(batch))
    for picture in pictures:
        if picture.name not in told:
            told[picture.name] = store.facts(keys[picture.name], partial(ask_alone, picture))
    return told


def _texts(
    cfg: TrainConfig, model: Tagger | Captioner, told: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, int]]:
    """The caption of each picture, by its name; and the tags that were pruned, with their counts."""
    if not model.are_tags:
        return {name: tags.caption_of_sentence(cfg.trigger, each) for name, each in told.items()}, {}
    without = tags.listed_tags(cfg.caption_without)
    chosen = {name: tags.chosen_tags(seen, cfg.caption_threshold, without) for name, seen in told.items()}
    pruned = tags.tags_of_the_character(list(chosen.values())) if cfg.prune_tags else {}
    kept = {name: [tag for tag in each if tag not in pruned] for name, each in chosen.items()}
    return {name: tags.caption_of_tags(cfg.trigger, each) for name, each in kept.items()}, pruned


def _lines(report: Report, cfg: TrainConfig, made: MadeCaptions, looked_at: int) -> list[str]:
    """What to tell of the captions that were made."""
    own = len(report.pictures) - len(made.by_picture)
    lines = []
    if not made.by_picture:
        return ["captions: every picture has a caption of your own, which stays as it is; none was made"]
    if own:
        lines.append(f"captions: {count(own, 'picture')} with a caption of your own, which stays as it is")
    if made.pruned:
        named = ", ".join(f"{tag} ({number})" for tag, number in made.pruned.items())
        lines.append(f"captions: pruned, on more than 90 % of {looked_at} pictures: {named}")
    elif cfg.prune_tags and looked_at < tags.FEWEST_TO_PRUNE:
        fewest = f"fewer than {tags.FEWEST_TO_PRUNE} pictures tell nothing of the character"
        lines.append(f"captions: nothing pruned: {fewest}")
    elif cfg.prune_tags:
        lines.append(f"captions: nothing pruned: no tag is on more than 90 % of {looked_at} pictures")
    bare = [name for name, each in made.by_picture.items() if each.text == " ".join(cfg.trigger.split())]
    if bare:
        lines.append(f"note: {count(len(bare), 'caption')} of the trigger alone ({listed(bare)})")
    too_long = [name for name, each in made.by_picture.items() if each.tokens > cfg.max_tokens]
    if too_long:
        over = f"longer than {cfg.max_tokens} tokens; what is over is not read"
        lines.append(f"note: {count(len(too_long), 'caption')} of these {over} ({listed(too_long)})")
    return lines
