"""Forms of the adapter in training: each changes the result and is repeatable, and an adapter of any tool can
be gone on from.
"""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import commands
import pytest
import torch
from adapted import inject_lora
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from test_adapters import tensors_of, unet_output
from test_interop import error, trained

import megaman_lora
from megaman.common.console import UserError
from megaman.common.kinds import SD1
from megaman.config.train import TrainConfig
from megaman.lora.adapter import Adapter, LoraLayer
from megaman.lora.formats import kohya_tensors
from megaman.lora.init_lora import init_of
from megaman.lora.injection import adapter_of, lora_modules
from megaman.lora.load import read_adapter
from megaman.lora.merge import MergedAdapter
from megaman.lora.save import write_adapter
from megaman.model.stable_diffusion import StableDiffusion, load_base
from megaman_lora import read_config, with_init_lora


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- training


def test_every_form_changes_the_result(train: Callable[..., Path]) -> None:
    short = ["--max_train_steps", "2", "--save_steps", "2"]
    results = [load_file(train(*short) / "adapter_model.safetensors")]
    for flags in ("--lora_targets conv", "--use_dora", "--use_rslora", "--lora_dropout 0.5"):
        results.append(load_file(train(*short, *flags.split()) / "adapter_model.safetensors"))
        assert not any(are_equal(results[-1], earlier) for earlier in results[:-1]), flags


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_training_twice_with_dropout_gives_the_same_bytes(train: Callable[..., Path]) -> None:
    flags = ["--lora_dropout", "0.5", "--lora_targets", "conv", "--train_batch_size", "1"]
    first = bytes_of(train(*flags))
    torch.manual_seed(1234)  # what went on before in the process must not matter
    assert bytes_of(train(*flags)) == first


def test_dropouts_masks_are_functions_of_the_position(tiny_base: StableDiffusion) -> None:
    """So a resumed run draws the masks of an unbroken one, and recomputed activations theirs."""
    from megaman.training.sampler import seed_dropout

    inject_lora(tiny_base.unet, TrainConfig(lora_dropout=0.5))
    for module in lora_modules(tiny_base.unet).values():
        module.lora_B["default"].weight.data.normal_(std=0.1)
    tiny_base.unet.train()

    def out(seed: int, position: int) -> torch.Tensor:
        seed_dropout(seed, position)
        torch.manual_seed(torch.initial_seed())  # unet_output seeds its own inputs
        noisy, text = torch.ones(1, 4, 16, 16), torch.ones(1, 77, 24)
        return tiny_base.unet(noisy, torch.tensor([10]), text).sample

    first = out(42, 7)
    torch.rand(5)
    assert torch.equal(out(42, 7), first)
    assert not torch.equal(out(42, 8), first)
    assert not torch.equal(out(43, 7), first)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            tiny_base.unet.enable_gradient_checkpointing()
        tiny_base.unet.zero_grad()
        out(42, 7).sum().backward()
        grads.append([p.grad.clone() for p in tiny_base.unet.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_an_untrained_dora_is_the_base_to_the_bit_and_learns_in_float32(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = load_base(str(tiny_folder), device=torch.device("cpu"), dtype=torch.float32)
    before = unet_output(base.unet, base)
    parameters = inject_lora(base.unet, TrainConfig(use_dora=True, lora_targets="conv"))
    assert torch.equal(unet_output(base.unet, base), before)
    assert (
        "A1111, InvokeAI, kohya's networks.lora and stable-diffusion.cpp can't apply it"
        in capsys.readouterr().err
    )
    assert len(parameters) == 3 * len(lora_modules(base.unet))
    half = load_base(str(tiny_folder), device=torch.device("cpu"), dtype=torch.bfloat16)
    trainable = inject_lora(half.unet, TrainConfig(use_dora=True, lora_targets="conv"))
    assert {parameter.dtype for parameter in trainable} == {torch.float32}


def test_a_dora_on_convolutions_trains_beside_the_preserved_class(train: Callable[..., Path]) -> None:
    folder = train(
        "--use_dora", "--lora_targets", "conv", "--preserve_weight", "1", "--gradient_checkpointing"
    )
    adapter = read_adapter(folder)
    assert adapter.is_dora
    assert any(layer.magnitude.ndim == 4 for layer in adapter.layers.values())
    assert read_adapter(folder / "pytorch_lora_weights.safetensors").digest == adapter.digest


# ---------------------------------------------------------------- going on from an adapter


def updates(unet: torch.nn.Module, base: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What each module's weight gains by PEFT's own merge."""
    found = {}
    for name, module in lora_modules(unet).items():
        module.merge()
        found[name] = module.get_base_layer().weight.detach() - base.get_submodule(name).weight
    return found


def saved(adapter: Adapter, kind: str, folder: Path) -> Path:
    """The adapter as the tool writes it."""
    if kind == "folder":
        write_adapter(adapter, folder)
        return folder
    path = folder / "a.safetensors"
    if kind == "diffusers with metadata":
        layers = {}
        for (_, name), layer in adapter.layers.items():
            layers |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
        StableDiffusionPipeline.save_lora_weights(
            folder, unet_lora_layers=layers, unet_lora_adapter_metadata={"r": 4, "lora_alpha": 32}
        )
        return folder / "pytorch_lora_weights.safetensors"
    tensors = tensors_of(adapter, kind.removesuffix(" without alpha"))
    if "without" in kind:
        tensors = {key: value for key, value in tensors.items() if not key.endswith("alpha")}
    save_file(tensors, path)
    return path


KINDS = ["folder", "kohya", "kohya without alpha", "diffusers", "diffusers old", "diffusers with metadata"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_training_begins_with_the_update_of_the_file(
    plain: StableDiffusion,
    tmp_path: Path,
    kind: str,
) -> None:
    targets = "attention" if kind == "diffusers old" else "conv"
    path = saved(
        adapter_of({"unet": trained(plain, lora_rank=4, lora_alpha=32, lora_targets=targets)}, SD1),
        kind,
        tmp_path,
    )
    cfg = with_init_lora(*read_config(["--init_lora", str(path)]))
    assert (cfg.lora_rank, cfg.lora_targets) == (4, targets)
    assert cfg.lora_alpha == (32 if kind in ("folder", "kohya", "diffusers with metadata") else 4)
    merged = merged_updates(path, plain)
    for name, update in updates(trained_from(plain, cfg), plain.unet).items():
        assert error(update, merged[name]) < 1e-5


def trained_from(base: StableDiffusion, cfg: TrainConfig) -> UNet2DConditionModel:
    """The model that training begins with."""
    unet = copy.deepcopy(base.unet)
    inject_lora(unet, cfg, init_of(cfg))
    return unet


def merged_updates(path: Path, base: StableDiffusion) -> dict[str, torch.Tensor]:
    """What our reader adds to each module."""
    unet = copy.deepcopy(base.unet)
    MergedAdapter(read_adapter(path), {"unet": unet}, SD1).set_scale(1.0)
    return {
        name: module.weight.detach() - base.unet.get_submodule(name).weight
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


@pytest.mark.parametrize("file", ["adapter_model", "megaman_lora", "pytorch_lora_weights"])
def test_a_dora_is_gone_on_from_with_its_lengths(plain: StableDiffusion, tmp_path: Path, file: str) -> None:
    live = trained(plain, lora_rank=8, lora_alpha=8, lora_targets="conv", use_dora=True)
    expected = unet_output(live, plain)
    write_adapter(adapter_of({"unet": live}, SD1), tmp_path)
    cfg = with_init_lora(*read_config(["--init_lora", str(tmp_path / f"{file}.safetensors")]))
    assert cfg.use_dora
    assert error(unet_output(trained_from(plain, cfg).eval(), plain), expected) < 1e-3


def test_mixed_ranks_and_strengths_come_to_one(plain: StableDiffusion, tmp_path: Path) -> None:
    """kohya's LoCon has a rank and an alpha of its own for the convolutions, and modules that we don't ask
    for.
    """
    layers = dict(
        adapter_of({"unet": trained(plain, lora_rank=8, lora_alpha=8, lora_targets="conv")}, SD1).layers
    )
    for key, layer in layers.items():
        if "conv" in key[1]:
            layers[key] = LoraLayer(layer.down[:2].clone(), layer.up[:, :2].clone(), 1.0)
    layers["unet", "down_blocks.0.resnets.0.time_emb_proj"] = LoraLayer(
        torch.ones(8, 64), torch.ones(16, 8), 8
    )
    save_file(kohya_tensors(Adapter(layers)), tmp_path / "locon.safetensors")
    cfg = with_init_lora(*read_config(["--init_lora", str(tmp_path / "locon.safetensors")]))
    assert (cfg.lora_rank, cfg.lora_alpha) == (8, 8)
    merged = merged_updates(tmp_path / "locon.safetensors", plain)
    for name, update in updates(trained_from(plain, cfg), plain.unet).items():
        assert error(update, merged[name]) < 1e-5


def test_rslora_goes_on_at_the_files_strength(plain: StableDiffusion, tmp_path: Path) -> None:
    live = trained(plain, lora_rank=4, lora_alpha=6, use_rslora=True)
    write_adapter(adapter_of({"unet": live}, SD1), tmp_path)
    for flags, alpha in (([], 12), (["--use_rslora"], 6)):
        cfg = with_init_lora(*read_config(["--init_lora", str(tmp_path), *flags]))
        assert cfg.lora_alpha == pytest.approx(alpha)
        assert error(unet_output(trained_from(plain, cfg), plain), unet_output(live, plain)) < 1e-5


def test_a_run_goes_on_from_an_earlier_runs_folder_and_repeats_from_its_record(
    train: Callable[..., Path], train_flags: list[str], adapter_folder: Path
) -> None:
    flags = [flag for flag in train_flags if flag not in ("--lora_rank", "--lora_alpha", "32")]
    flags = [*[f for f in flags if f != "4"], "--init_lora", str(adapter_folder)]
    flags.insert(flags.index("--max_train_steps") + 1, "1")
    flags.insert(flags.index("--resolution") + 1, "32")
    flags.insert(flags.index("--validation_steps") + 1, "4")
    folder = megaman_lora.train(with_init_lora(*read_config(flags)))
    before, after = read_adapter(adapter_folder), read_adapter(folder)
    assert before.layers.keys() == after.layers.keys()
    steps = [error(after.layers[key].delta(), before.layers[key].delta()) for key in before.layers]
    assert 0 < max(steps) < 1  # a step away, not a fresh start
    record = folder.parent / "training_config.json"
    assert json.loads(record.read_text())["init_lora"] == str(adapter_folder)
    assert after.metadata["config"]["init_lora"] == "lora_weights"  # no path
    again = bytes_of(megaman_lora.train(with_init_lora(*read_config(["--config", str(record)]))))
    assert again == bytes_of(folder.parent.with_name("out.001") / "lora_weights")


# ---------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--lora_rank", "8"], "--lora_rank 8: --init_lora .* is of lora_rank 4"),
        (["--lora_alpha", "16"], "--lora_alpha 16.0: --init_lora .* is of lora_alpha 32"),
        (["--lora_targets", "conv"], "--lora_targets conv: --init_lora .* is of lora_targets attention"),
        (["--use_dora"], "--use_dora True: --init_lora .* is of use_dora False"),
        (["--use_rslora", "--lora_alpha", "32"], "--lora_alpha 32.0: --init_lora .* is of lora_alpha 16"),
    ],
)
def test_a_flag_that_contradicts_the_file_is_an_error_that_names_both(
    adapter_folder: Path, flags: list[str], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint) as raised:
        with_init_lora(*read_config(["--init_lora", str(adapter_folder), *flags]))
    assert raised.value.exit_code == 2


def test_flags_that_agree_with_the_file_and_a_presets_settings_are_no_contradiction(
    adapter_folder: Path,
) -> None:
    flags = ["--init_lora", str(adapter_folder), "--preset", "pro"]
    cfg = with_init_lora(
        *read_config([*flags, "--lora_rank", "4", "--lora_alpha", "32", "--lora_targets", "attention"])
    )
    assert (cfg.lora_rank, cfg.lora_alpha) == (4, 32)
    assert with_init_lora(*read_config(flags)).lora_rank == 4


def test_a_configuration_that_never_saw_the_file_is_checked_before_it_trains(
    tiny_base: StableDiffusion, adapter_folder: Path
) -> None:
    with pytest.raises(UserError, match="is of lora_rank 4"):
        init_of(TrainConfig(init_lora=str(adapter_folder)))


def test_what_cannot_be_gone_on_from_says_why(plain: StableDiffusion, tmp_path: Path) -> None:
    live = adapter_of({"unet": trained(plain, lora_rank=4, lora_alpha=4)}, SD1)
    tensors = kohya_tensors(live)
    first = next(iter(tensors)).split(".")[0]
    text = {
        f"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_{part}.weight": torch.ones(shape)
        for part, shape in (("down", (1, 24)), ("up", (24, 1)))
    }
    columns = tensors[f"{first}.lora_down.weight"].shape[1]
    files = {
        "text encoder": tensors | text,
        "some of its modules": tensors | {f"{first}.dora_scale": torch.ones(16, 1)},
        "alpha is 0": {key: value * 0 if "alpha" in key else value for key, value in tensors.items()},
        "measures columns": tensors
        | {
            key.replace(".alpha", ".dora_scale"): torch.ones(
                1, tensors[key.replace(".alpha", ".lora_down.weight")].shape[1]
            )
            for key in tensors
            if "alpha" in key
        },
        "made for another base": tensors | {f"{first}.lora_down.weight": torch.ones(4, columns + 1)},
        "does not have": tensors
        | {f"lora_unet_nowhere_to_q.lora_{part}.weight": torch.ones(4, 4) for part in ("down", "up")},
    }
    for reason, content in files.items():
        save_file(content, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match=reason) as raised:
            trained_from(
                plain, with_init_lora(*read_config(["--init_lora", str(tmp_path / "a.safetensors")]))
            )
        assert raised.value.exit_code == 4
    (tmp_path / "empty").mkdir()
    for name, reason in (("nowhere.safetensors", "no such adapter"), ("empty", "no adapter in this folder")):
        with pytest.raises(UserError, match=f"{reason}.*Name another with --init_lora"):
            with_init_lora(TrainConfig(init_lora=str(tmp_path / name)))


def test_what_peft_cannot_train_is_refused_before_it_crashes(tiny_folder: Path) -> None:
    half = load_base(str(tiny_folder), device=torch.device("cpu"), dtype=torch.bfloat16)
    with pytest.raises(UserError, match="PEFT can't train convolutions so in half precision") as raised:
        inject_lora(half.unet, TrainConfig(use_dora=True, lora_dropout=0.1, lora_targets="linear"))
    assert raised.value.exit_code == 2
    inject_lora(half.unet, TrainConfig(use_dora=True, lora_dropout=0.1))  # attention alone it can


@pytest.mark.parametrize("share", ["-0.1", "1", "nan"])
def test_an_impossible_dropout_is_a_usage_error(
    share: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["megaman_lora.py", "--lora_dropout", share])
    with pytest.raises(SystemExit) as left:
        commands.run(commands.training)
    assert left.value.code == 2
    assert "0 or more and below 1" in capsys.readouterr().err
