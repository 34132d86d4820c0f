from dataclasses import MISSING, dataclass, field, fields
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from hf_fae.data.images import DataArguments
from hf_fae.objectives.generator import GeneratorArguments
from hf_fae.objectives.reconstruction_losses import ReconstructionArguments
from hf_fae.objectives.repa import REPAArguments
from hf_fae.training.arguments import LoopArguments
from hf_fae.utils.parsing import parse_arguments


@dataclass
class Model:
    """Of a script."""

    name: str = field(metadata={"help": "Which."})
    sizes: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Of the layers."})
    rope: bool = field(default=True, metadata={"help": "Whether."})
    limit: int | None = field(default=None, metadata={"help": "At most."})


def parse(tmp_path, values, *flags):
    path = tmp_path / "config.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return parse_arguments(Model, LoopArguments, argv=["--config", str(path), *flags])


def test_file_then_flags(tmp_path):
    values = {"name": "a", "sizes": [3, 4, 5], "rope": False, "output_dir": "o", "learning_rate": 0.5, "seed": 3}
    model, loop, config = parse(tmp_path, values, "--seed", "4", "--name=b")
    assert (model.name, model.sizes, model.rope, model.limit) == ("b", [3, 4, 5], False, None)
    assert (loop.output_dir, loop.learning_rate, loop.seed) == ("o", 0.5, 4)
    assert config["seed"] == 4 and config["sizes"] == [3, 4, 5] and config["max_grad_norm"] == 1.0
    assert yaml.safe_load(yaml.safe_dump(config)) == config


def test_flags_alone():
    model, loop, _ = parse_arguments(Model, LoopArguments, argv=["--name", "a", "--output_dir", "o", "--no_rope"])
    assert (model.rope, loop.output_dir) == (False, "o")


def test_former_names_of_arguments(tmp_path):
    assert parse(tmp_path, {"name": "a", "output_dir": "o", "max_corrupt_share": 0.5})[1].max_corrupt_share == 0.5
    for flags in (["--max_corrupt_share", "0.2"], ["--max-damaged-share=0.2"], ["--max_corrupt_share", "0.2"]):
        _, loop, config = parse(tmp_path, {"name": "a", "output_dir": "o", "max_corrupt_share": 0.5}, *flags)
        assert loop.max_corrupt_share == config["max_corrupt_share"] == 0.2


def test_null_is_the_default_and_numbers_without_a_dot_are_numbers(tmp_path):
    _, loop, _ = parse(tmp_path, "name: a\noutput_dir: o\nlearning_rate: 1e-4\nlimit: null\n")
    assert loop.learning_rate == 1e-4  # YAML itself takes 1e-4 for text


@pytest.mark.parametrize(
    ("values", "flags", "message"),
    [
        ({"name": "a", "output_dir": "o", "colour": "red"}, [], "unknown arguments: --colour red"),
        ({"name": "a", "output_dir": "o", "seed": "many"}, [], "--seed: invalid int value: 'many'"),
        ({"name": "a", "output_dir": "o", "lr_scheduler": "linear"}, [], "lr-scheduler: invalid choice: 'linear'"),
        ({"name": "a"}, [], "the following arguments are required: --output_dir"),
        ({"name": "a"}, ["--output_dir", "o", "--depth", "3"], "unknown arguments: --depth 3"),
        ("- name\n- a\n", [], "the file must hold a mapping of arguments, not list"),
    ],
)
def test_mistakes(tmp_path, capsys, values, flags, message):
    with pytest.raises(SystemExit):
        parse(tmp_path, values, *flags)
    assert message in capsys.readouterr().err


def test_all_loop_arguments_have_help():
    assert all(option.metadata.get("help") for option in LoopArguments.__dataclass_fields__.values())


ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "training_scripts"
CONFIGS = sorted(
    path
    for folder in ("training_scripts", "experiments/emoji", "tests")
    for path in (ROOT / folder / "configs").rglob("*.yaml")
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_parse(path, monkeypatch):
    """Every key of every config is an argument of its script, with a value of the right type."""
    for folder in (SCRIPTS, ROOT / "experiments/emoji"):
        monkeypatch.syspath_prepend(folder)
    groups = [*script_arguments(path.stem), DataArguments]
    values = yaml.safe_load(path.read_text())
    required = [field.name for group in groups for field in required_fields(group)]
    flags = [f"--{name}=x" for name in required if name not in values]  # what a smoke config leaves open
    *_, config = parse_arguments(*groups, argv=["--config", str(path), *flags])
    assert {name: config[name] for name in values} == values


@pytest.mark.parametrize(
    "script",
    [
        "fae",
        "pixel_decoder",
        "drorae",
        "detok",
        "maetok",
        "lora",
        "generator",
        "starflow",
        "text_to_image",
        "autoregressive",
        "latents",
    ],
)
def test_saved_config_is_one_to_start_from(script, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    groups = [*script_arguments(script), DataArguments]
    required = [f"--{field.name}=x" for group in groups for field in required_fields(group)]
    *_, config = parse_arguments(*groups, argv=required)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    *_, again = parse_arguments(*groups, argv=["--config", str(tmp_path / "config.yaml")])
    assert again == config


def script_arguments(config):
    """The arguments of a config's script, except those of the data."""
    if "latents" in config:
        return [import_module("cache_latents").CacheArguments]
    if "starflow" in config:
        return [import_module("train_starflow").STARFlowArguments, LoopArguments]
    if "text" in config or "mmdit" in config:
        return [import_module("train_text_to_image").TextToImageArguments, LoopArguments]
    if "autoregressive" in config or config.startswith("mar_") or "_ar_" in config:
        return [import_module("train_autoregressive").AutoregressiveArguments, LoopArguments]
    if config.endswith("vae"):
        return [import_module("train_vae").VAEArguments, ReconstructionArguments, LoopArguments]
    if "pixel_decoder" in config:
        return [import_module("train_pixel_decoder").PixelDecoderArguments, ReconstructionArguments, LoopArguments]
    if "drorae" in config or "raev2_dinov3" in config or "raev2_decoder" in config:
        return [import_module("train_drorae").DRoRAEArguments, ReconstructionArguments, LoopArguments]
    for name in ("DeTok", "MAETok"):
        if name.lower() in config:
            group = getattr(import_module(f"train_{name.lower()}"), f"{name}Arguments")
            return [group, ReconstructionArguments, LoopArguments]
    if "few_steps" in config:
        group = import_module("train_few_steps").FewStepsArguments
    elif "lora" in config:
        group = import_module("train_lora").LoraArguments
    elif "generator" in config or "dit" in config or "sit_" in config or "_sit" in config:
        return [import_module("train_generator").DenoiserArguments, REPAArguments, LoopArguments]
    else:
        group = import_module("train_fae").FAEArguments
    return [group, LoopArguments]


def required_fields(group):
    return [f for f in fields(group) if f.default is MISSING and f.default_factory is MISSING]


def test_help_can_be_printed(capsys):
    """A bare per cent sign in a text would break it."""
    with pytest.raises(SystemExit) as exit:
        parse_arguments(LoopArguments, DataArguments, GeneratorArguments, argv=["--help"])
    assert exit.value.code == 0
    assert "--label_dropout" in capsys.readouterr().out
