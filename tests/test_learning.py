"""The LoRA learns the hero, on pictures it never saw: a short run of the demo, and its controls.

The full one: bench/bench_learning.py.
"""

from pathlib import Path

from bench.bench_learning import (
    HELD_OUT,
    change,
    embedded_base,
    encoded_folder,
    trained,
    untrained_equals_base,
    with_shuffled_captions,
)

SHORT = ("--max_train_steps", "70", "--train_batch_size", "2", "--preserve_weight", "0")


def test_a_short_run_learns_the_hero_and_foreign_pictures_do_not_teach_him(tmp_path: Path) -> None:
    base = embedded_base()
    sets = {"hero": encoded_folder(HELD_OUT, base)}
    learned = change(base, trained(None, tmp_path / "hero", *SHORT), sets)["hero"]
    shuffled = with_shuffled_captions(tmp_path / "shuffled")
    control = change(base, trained(shuffled, tmp_path / "control", *SHORT), sets)["hero"]
    assert learned < -8, (learned, control)
    assert control > learned / 3, (learned, control)


def test_an_untrained_lora_changes_no_bit_of_the_losses() -> None:
    base = embedded_base()
    assert untrained_equals_base(base, encoded_folder(HELD_OUT, base))
