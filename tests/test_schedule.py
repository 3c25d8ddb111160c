"""What a run is told to come to, before it costs anything."""

from megaman.config.train import TrainConfig
from megaman.training.sampler import Sampler
from megaman.training.schedule import describe_plan, plan


def told(sampler: Sampler, **settings: int) -> list[str]:
    return describe_plan(plan(TrainConfig(**settings), sampler), sampler)


def test_the_plan_counts_the_pictures_that_are_seen() -> None:
    sampler = Sampler((tuple(range(8)), (8, 9, 10, 11)), step_size=4, seed=0)
    (line,) = told(sampler, max_train_steps=1500)
    assert line.startswith("plan: 1500 steps of 4 pictures = 6000 seen, 500.0 passes over 12; rank 8")
    assert sum(len(sampler.batch(step)) for step in range(1500)) == 6000
    (line,) = told(Sampler(((0, 1, 2, 3) * 3,), 4, 0), max_train_steps=6)
    assert "= 24 seen, 2.0 passes over 12, their repeats counted;" in line


def test_a_size_with_fewer_pictures_than_a_step_is_told() -> None:
    line, note = told(Sampler(((0, 1, 2),), 8, 0), max_train_steps=3)
    assert line.startswith("plan: 3 steps of 8 pictures = 24 seen, 8.0 passes over 3;")
    assert note == (
        "note: 1 of 1 training size has fewer pictures than a step, which shows them again, under other noise"
    )
    assert told(Sampler(((0,), (1,), (2, 3)), 2, 0))[1].startswith("note: 2 of 3 training sizes have fewer")


def test_a_warm_up_that_takes_the_whole_run_is_told_with_the_remedy() -> None:
    sampler = Sampler((tuple(range(8)),), 4, 0)
    _, note = told(sampler, max_train_steps=3, lr_warmup_steps=100)
    assert note.startswith(
        "note: the warm-up of 100 steps takes the whole run, so the learning rate only rises"
    )
    assert "--lr_warmup_steps" in note
    assert len(told(sampler, max_train_steps=101, lr_warmup_steps=100)) == 1
    assert len(told(sampler, max_train_steps=1)) == 1
