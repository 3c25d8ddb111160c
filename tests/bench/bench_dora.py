"""How near each program comes to a DoRA that PEFT trained, by the way its lengths stand in the file.

    python tests/bench/bench_dora.py [--layers 24] [--adapters RUN/lora_weights ...]

The programs' formulas are written down anew from their published code. W is a base's weight, V = W + B A
alpha / rank, m the trained lengths of V's rows. Layers: random ones of the shapes of Stable Diffusion 1.5's
attention at rank 8, gentle (V's rows 0.2 % longer than W's) and hard (45 %); and those of each adapter that
was trained with --use_dora on the embedded base. An error is the size of a program's change to W minus the
true one, relative to the true one, the median over the layers; of adapters the UNet's output, too. Prints a
table, then one JSON line.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megaman.common.console import quiet_libraries  # noqa: E402

quiet_libraries()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from megaman.config.train import EMBEDDED  # noqa: E402
from megaman.lora.load import read_adapter  # noqa: E402
from megaman.model.stable_diffusion import load_base  # noqa: E402

RANK = 8
SHAPES = [(320, 320), (320, 768), (640, 640), (640, 768)]
GROWTH = {"gentle": 0.002, "hard": 0.45}  # of the rows' lengths
STRETCH = {"gentle": 0.003, "hard": 0.03}  # of m against W's lengths, a standard deviation


@dataclass(frozen=True)
class Layer:
    """A trained DoRA layer. weight (out,in), delta (out,in) of rank RANK, lengths (out,1)."""

    weight: Tensor
    delta: Tensor
    lengths: Tensor

    @property
    def turned(self) -> Tensor:
        """V."""
        return self.weight + self.delta

    @property
    def change(self) -> Tensor:
        """What PEFT adds to the weight."""
        return self.lengths / rows(self.turned) * self.turned - self.weight


def rows(weight: Tensor) -> Tensor:
    """The lengths of the rows: (out,in) -> (out,1)."""
    return weight.norm(dim=1, keepdim=True)


def columns(weight: Tensor) -> Tensor:
    """The lengths of the columns: (out,in) -> (1,in)."""
    return weight.norm(dim=0, keepdim=True)


def random_layer(shape: tuple[int, int], kind: str) -> Layer:
    """A layer whose rows have grown as the kind says."""
    weight = torch.randn(shape, dtype=torch.float64) / shape[1] ** 0.5
    delta = torch.randn(shape[0], RANK, dtype=torch.float64) @ torch.randn(
        RANK, shape[1], dtype=torch.float64
    )
    share = ((1 + GROWTH[kind]) ** 2 - 1) ** 0.5  # the two are all but at right angles
    delta *= share * weight.norm() / delta.norm()
    lengths = rows(weight) * (1 + STRETCH[kind] * torch.randn(shape[0], 1, dtype=torch.float64))
    return Layer(weight, delta, lengths)


# ---------------------------------------------------------------- the programs
Reader = Callable[[Layer, Tensor], Tensor]


def by_either_axis(layer: Layer, scale: Tensor) -> Tensor:
    """PEFT, diffusers, LyCORIS, today's SD.Next, this project: the axis is the file's, the lengths V's."""
    lengths = rows(layer.turned) if scale.shape[1] == 1 else columns(layer.turned)
    return scale / lengths * layer.turned - layer.weight


def by_the_bases_rows(layer: Layer, scale: Tensor) -> Tensor:
    """ComfyUI and Forge: along the rows the lengths are W's, along the columns V's."""
    lengths = rows(layer.weight) if scale.shape[1] == 1 else columns(layer.turned)
    return scale / lengths * layer.turned - layer.weight


def by_columns(layer: Layer, scale: Tensor) -> Tensor:
    """A1111, InvokeAI, older ComfyUI and SD.Next: V's columns, whatever the file's axis."""
    return scale / columns(layer.turned) * layer.turned - layer.weight


def without_lengths(layer: Layer, scale: Tensor) -> Tensor:
    """kohya's networks.lora."""
    return layer.delta


READERS: dict[str, Reader] = {
    "LyCORIS, SD.Next": by_either_axis,
    "ComfyUI, Forge": by_the_bases_rows,
    "A1111, InvokeAI": by_columns,
    "kohya": without_lengths,
}

# ---------------------------------------------------------------- the files


def error(found: Tensor, wanted: Tensor) -> float:
    """The size of the difference, relative to what is wanted."""
    return ((found - wanted).norm() / wanted.norm()).item()


def extracted(change: Tensor, rank: int) -> Tensor:
    """The nearest plain LoRA of a rank."""
    up, sizes, down = torch.linalg.svd(change, full_matrices=False)
    return (up[:, :rank] * sizes[:rank]) @ down[:rank]


def changes_of(layer: Layer) -> dict[str, tuple[Tensor, Tensor]]:
    """What every program adds to the weight for every file that could be written, and what it should."""
    turned, true = layer.turned, layer.change
    result = layer.weight + true
    on_columns = columns(layer.weight) * (layer.lengths / rows(layer.weight)).mean()
    files = {
        "rows, as written": (layer.lengths, true),
        "rows, turned for ComfyUI": (layer.lengths * rows(layer.weight) / rows(turned), true),
        "columns, the nearest": ((turned * result).sum(dim=0, keepdim=True) / columns(turned), true),
        "columns, had they been trained": (on_columns, on_columns / columns(turned) * turned - layer.weight),
    }
    found = {
        f"{file}: {program}": (read(layer, scale), wanted)
        for file, (scale, wanted) in files.items()
        for program, read in READERS.items()
    }
    for rank in (RANK, 2 * RANK, 8 * RANK):
        found[f"no lengths, the nearest LoRA of rank {rank}: all"] = (extracted(true, rank), true)
    return found


def median_errors(layers: Mapping[str, Layer]) -> dict[str, float]:
    """The median over the layers, by file and program."""
    errors = [{name: error(*pair) for name, pair in changes_of(layer).items()} for layer in layers.values()]
    return {name: statistics.median(each[name] for each in errors) for name in errors[0]}


# ---------------------------------------------------------------- adapters


def layers_of(folder: Path, unet: nn.Module) -> dict[str, Layer]:
    """The linear modules of a DoRA that was trained on this UNet."""
    found = {}
    for (_, name), layer in read_adapter(folder).layers.items():
        if layer.magnitude is not None and layer.magnitude.ndim == 2:
            weight = unet.get_submodule(name).weight.detach().double()
            found[name] = Layer(weight, layer.delta().double(), layer.magnitude.double())
    return found


def output_errors(layers: Mapping[str, Layer], unet: nn.Module) -> dict[str, float]:
    """The error of the UNet's output, relative to the DoRA's effect, by file and program."""
    torch.manual_seed(5)
    config = unet.config
    noisy, text = torch.randn(4, config.in_channels, 16, 16), torch.randn(4, 77, config.cross_attention_dim)

    @torch.no_grad()
    def output(changes: Mapping[str, Tensor]) -> Tensor:
        changed = copy.deepcopy(unet)
        for name, change in changes.items():
            changed.get_submodule(name).weight += change.float()
        return changed(noisy, torch.tensor([100, 300, 500, 800]), text).sample

    by_layer = {name: changes_of(layer) for name, layer in layers.items()}
    untouched, found = output({}), {}
    for kind in next(iter(by_layer.values())):
        ours, wanted = (
            output({name: changes[kind][i] for name, changes in by_layer.items()}) for i in range(2)
        )
        found[kind] = ((ours - wanted).norm() / (wanted - untouched).norm()).item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--adapters", type=Path, nargs="*", default=[])
    flags = parser.parse_args()
    torch.manual_seed(0)
    table = {}
    for kind in GROWTH:
        shapes = [SHAPES[i % len(SHAPES)] for i in range(flags.layers)]
        layers = {str(i): random_layer(shape, kind) for i, shape in enumerate(shapes)}
        table[kind] = median_errors(layers)
    unet = load_base(EMBEDDED, device=torch.device("cpu"), dtype=torch.float32).unet
    for number, folder in enumerate(flags.adapters, start=1):
        layers = layers_of(folder, unet)
        growths = [(rows(layer.turned) / rows(layer.weight)).median().item() - 1 for layer in layers.values()]
        print(f"adapter {number}: {len(layers)} layers, rows grown by {statistics.median(growths):.1%}")
        table[f"weights {number}"] = median_errors(layers)
        table[f"output {number}"] = output_errors(layers, unet)
    print(f"{'file: program':<50}", *(f"{kind:>10}" for kind in table))
    for name in table["hard"]:
        print(f"{name:<50}", *(f"{errors[name]:10.2g}" for errors in table.values()))
    print(json.dumps({"bench": "dora", "torch": torch.__version__, "layers": flags.layers, "errors": table}))


if __name__ == "__main__":
    main()
