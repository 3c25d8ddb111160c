"""Several processes: they agree on what to do where one of them runs out of memory."""

import json
from pathlib import Path

import torch
from conftest import flags_of_a_run, run_script, save_pictures

# What each of two processes does: an honest step; the same while the second has no room for two pictures;
# the empty steps of a run by two clocks; then a whole run in which the second has room for nothing.
DRIVER = """
import json, os, sys, time
from dataclasses import replace
import torch
sys.path[:0] = sys.argv[2:]
import commands, megaman_lora
from megaman.model.compute import smallest
from megaman.training import objective, pace
from megaman.training.tracker import SilentTracker
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
flags = json.loads(sys.argv[1])
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
del sys.argv[1:]
try:
    commands.run(lambda: megaman_lora.main(megaman_lora.read_config(flags)[0], ()))
except SystemExit as left:
    with open(f"{run.folder.path}.{rank}.json", "w") as file:
        json.dump({"found": found, "code": left.code}, file)
"""


def test_processes_agree_on_smaller_batches_where_one_runs_out_of_memory(
    tiny_folder: Path, tmp_path: Path
) -> None:
    flags = flags_of_a_run(tiny_folder, save_pictures(tmp_path / "pictures"), tmp_path / "out")
    flags += ["--lora_rank", "1", "--validation_steps", "100", "--gradient_checkpointing"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    here = Path(__file__).parent
    result = run_script(*launch, str(driver), json.dumps(flags), str(here.parent), str(here), timeout_s=100)
    assert result.returncode == 0, result.stderr
    first, second = (json.loads((tmp_path / f"out.{rank}.json").read_text()) for rank in (0, 1))
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
    assert result.stderr.count("memory ran out at step 1: 1 at a time now") == 2  # in both trials
    assert (first["code"], second["code"]) == (6, 6)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "out of memory at step 1" in errors[0]
    assert "Traceback" not in result.stderr
