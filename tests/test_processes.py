"""Several processes: they train as one, and agree on what to do where one of them runs out of memory."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapted import weights_in
from conftest import EVERY_KIND, KINDS_OF_RUNS, flags_of_a_run, run_script, save_pictures
from test_train import differences, distance

import megaman_lora
from megaman.common.kinds import SD1, Kind

# What each of two processes does: the script itself, once for each run; then, with the last run's flags, an
# honest step; the same while the second has no room for two pictures; the empty steps of a run by two clocks;
# then a whole run in which the second has room for nothing. What is told of a run goes to its folder.
DRIVER = """
import json, os, runpy, sys, time
rank = int(os.environ["RANK"])
*runs, (starved_folder, flags) = json.load(open(sys.argv[1]))
sys.path[:0] = sys.argv[2:]

def begin(folder, flags):
    os.dup2(os.open(f"{folder}/told.{rank}", os.O_WRONLY | os.O_CREAT), 2)
    sys.argv = ["megaman_lora.py", *flags]

for number, run in enumerate(runs, 1):
    begin(*run)
    runpy.run_path("megaman_lora.py", run_name="__main__")
    from accelerate.state import AcceleratorState
    from torch.distributed import distributed_c10d
    AcceleratorState._reset_state(reset_partial_state=True)
    distributed_c10d._world.group_count = number  # the next group meets under a name of its own
begin(starved_folder, flags)
from dataclasses import replace
import torch
import commands, megaman_lora
from megaman.model.compute import smallest
from megaman.training import objective, pace
from megaman.training.tracker import SilentTracker
torch.set_num_threads(1)
honest, room = objective.denoising_losses, 9

def starved(unet, batch, *rest):
    if rank == 1 and len(batch.latents) > room:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return honest(unet, batch, *rest)

objective.denoising_losses = starved
run = megaman_lora.set_up(megaman_lora.read_config(flags)[0])
megaman_lora.begin(run)
found = [smallest([8.0, 24.0][rank], run.accelerator), smallest([8.0, None][rank], run.accelerator)]
for room in (9, 1):
    losses = megaman_lora.forward_backward(run, run.data.sampler.batch(0), 0)
    row = torch.cat([each.grad.flatten() for each in run.trainable.values()])
    found.append((row.tolist(), losses.mean.item(), run.memory.batch))
    run.optimizer.zero_grad()
now, honest_time = [0.0], time.monotonic
time.monotonic = lambda: now[0]
def pass_time():
    now[0] += 1 + rank  # the second process is twice as slow, or its clock fast
run.cfg, run.pace = replace(run.cfg, max_minutes=1, lr_warmup_steps=None), pace.Pace()
steps = [pass_time() or step for step in pace.steps(run, SilentTracker(range(4), []), pass_time)]
found.append((len(steps), run.cfg.max_train_steps, run.cfg.earlier_total, run.cfg.lr_warmup_steps))
time.monotonic = honest_time
room = 0
try:
    commands.run(lambda: megaman_lora.main(megaman_lora.read_config(flags)[0], ()))
except SystemExit as left:
    with open(f"{run.folder.path}.{rank}.json", "w") as file:
        json.dump({"found": found, "code": left.code}, file)
"""


@pytest.fixture(scope="module")
def launched(
    tiny_folders: Callable[[Kind], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The folders in which two processes have run each of KINDS_OF_RUNS, and `starved`. They do it one after
    the other: to start them takes longer than all that they do.
    """
    starved = ["--lora_rank", "1", "--validation_steps", "100", "--gradient_checkpointing"]
    slowly = ["--learning_rate", "1e-3"]
    more_flags = {name: [*more, *slowly] for name, (_, more) in KINDS_OF_RUNS.items()} | {"starved": starved}
    folders, runs = {}, []
    for name, more in more_flags.items():
        folder = folders[name] = tmp_path_factory.mktemp("launched")
        base = tiny_folders(KINDS_OF_RUNS.get(name, (SD1, []))[0])
        pictures = save_pictures(folder / "pictures")
        runs.append((str(folder), [*flags_of_a_run(base, pictures, folder / "out"), *more]))
    here = Path(__file__).parent
    root = tmp_path_factory.mktemp("driver")
    (root / "driver.py").write_text(DRIVER)
    (root / "runs.json").write_text(json.dumps(runs))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = (root / "driver.py", root / "runs.json", here.parent, here)
    result = run_script(*launch, *map(str, paths))
    assert result.returncode == 0, "\n".join([result.stderr, *map(told_in, folders.values())])
    return folders


def told_in(folder: Path) -> str:
    """What both processes said of a run."""
    return "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("told.*")))


@EVERY_KIND
def test_two_processes_train_as_one_with_twice_the_batch(
    launched: dict[str, Path], request: pytest.FixtureRequest, train_flags: list[str]
) -> None:
    folder = launched[request.node.callspec.id]
    told = told_in(folder)
    assert told.count("plan: 4 steps of 4 pictures") == 1
    assert "2 processes" in told
    files = ["out", "pictures", "told.0", "told.1"]
    assert sorted(path.name for path in folder.iterdir()) == files  # one output of both
    two = weights_in(folder / "out" / "lora_weights")
    single = [*train_flags, "--learning_rate", "1e-3", "--train_batch_size", "4"]
    one = weights_in(megaman_lora.train(megaman_lora.read_config(single)[0]))
    assert differences(one, two).quantile(0.99) < 1e-4
    assert distance(one, two) < 1e-2  # Adam turns the rounding of an almost vanishing gradient into a step


def test_processes_agree_on_smaller_batches_where_one_runs_out_of_memory(launched: dict[str, Path]) -> None:
    folder = launched["starved"]
    told = told_in(folder)
    first, second = (json.loads((folder / f"out.{rank}.json").read_text()) for rank in (0, 1))
    assert first["found"] == second["found"]  # gradients and losses are of all, to the bit
    card, unknown, (whole, loss, batch), (halved, same_loss, smaller), by_the_clock = first["found"]
    done, total, earlier, warmup = by_the_clock  # one clock decides for all, whatever the others say
    assert done == total > 30
    assert earlier[0] <= earlier[1] / 4
    assert warmup == round(0.05 * earlier[1])
    assert (card, unknown) == (8.0, None)  # what all decide by
    assert (batch, smaller) == (2, 1)
    whole, halved = torch.tensor(whole), torch.tensor(halved)
    assert (whole - halved).abs().max() < 1e-5 * whole.abs().max()
    assert abs(loss - same_loss) < 1e-5 * loss
    assert told.count("memory ran out at step 1: 1 at a time now") == 2  # in both trials
    assert (first["code"], second["code"]) == (6, 6)
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, told
    assert "out of memory at step 1" in errors[0]
    assert "Traceback" not in told
