"""What is kept of a run's settings: its record, what a resume must not change, what a shared file tells."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megaman.config.train import FACTS, TrainConfig


def recorded(cfg: TrainConfig) -> dict[str, Any]:
    """The settings of the run, for training_config.json: all but those of one command, and but for a total
    that --max_minutes has not decided yet.
    """
    settings = {name: value for name, value in asdict(cfg).items() if not FACTS[name].is_of_one_command}
    if cfg.max_minutes is not None:
        del settings["max_train_steps"]
    return settings


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings that decide a run's result, under their flags' names: a resume must not change them. Of
    a run that was made before a setting there was, what it did.
    """
    free = {name for name, facts in FACTS.items() if facts.is_free or facts.is_of_one_command}
    whole = {name: facts.before for name, facts in FACTS.items() if facts.before is not None} | dict(settings)
    return {f"--{name}": value for name, value in whole.items() if name not in free}


def published(cfg: TrainConfig) -> dict[str, Any]:
    """The settings as a file that is shared may carry them: of a path, its last part at most."""
    told = {
        name: value for name, value in recorded(cfg).items() if value != FACTS[name].before or value is None
    }
    shown = {name: value for name, value in told.items() if FACTS[name].published != "never"}
    for name, value in shown.items():
        if FACTS[name].published == "name" and value:
            shown[name] = Path(value).name
    return shown
