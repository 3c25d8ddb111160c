"""The LoRA learns the hero, on pictures it never saw: a short run of the demo, and its controls.

The full one: bench/bench_learning.py.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from bench import bench_learning
from bench.bench_learning import (
    HELD_OUT,
    change,
    embedded_base,
    encoded_folder,
    losses,
    trained,
    untrained_equals_base,
    with_shuffled_captions,
)

from megaman.training.encoding import EncodedDataset

SHORT = ("--max_train_steps", "20", "--train_batch_size", "2", "--preserve_weight", "0")
ONE_PREVIEW = ("--validation_prompt", "mega man")


@pytest.fixture(scope="module", autouse=True)
def few_timesteps() -> Iterator[None]:
    """Measures at five timesteps, not at twenty, which tell the same to a hundredth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_learning, "TIMESTEPS", range(25, 1000, 200))
        yield


@pytest.fixture(scope="module")
def sets() -> dict[str, EncodedDataset]:
    """The hero's held-out pictures, encoded."""
    return {"hero": encoded_folder(HELD_OUT, embedded_base())}


@pytest.fixture(scope="module")
def base_losses(sets: dict[str, EncodedDataset]) -> dict[str, list[float]]:
    """What the base without an adapter loses on each of them."""
    base = embedded_base()
    return {name: losses(base, encoded) for name, encoded in sets.items()}


@pytest.mark.usefixtures("all_threads")
def test_a_short_run_learns_the_hero_and_foreign_pictures_do_not_teach_him(
    sets: dict[str, EncodedDataset], base_losses: dict[str, list[float]], tmp_path: Path
) -> None:
    def changed_by(data: Path | None, name: str) -> float:
        adapter = trained(data, tmp_path / name, *SHORT, *ONE_PREVIEW)
        return change(embedded_base(), adapter, sets, base_losses)["hero"]

    learned = changed_by(None, "hero")
    control = changed_by(with_shuffled_captions(tmp_path / "shuffled"), "control")
    assert learned < -15, (learned, control)
    assert control > learned / 3, (learned, control)


def test_an_untrained_lora_changes_no_bit_of_the_losses(
    sets: dict[str, EncodedDataset], base_losses: dict[str, list[float]]
) -> None:
    assert untrained_equals_base(embedded_base(), sets["hero"], base_losses["hero"])
