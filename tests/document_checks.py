"""Ways to check the commands of the documentation.

Commands run as a user types them, in a directory with tiny models and data under the names that the documentation uses
(`document_world`); appended flags, which win, make them tiny. Trainings run for one step. Benchmarks, and scripts that
start others, only parse their arguments.
"""

import argparse
import configparser
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from document_world import DATA, JUDGE, LATENTS, STAND_IN
from documents import ROOT
from transformers import HfArgumentParser

from hf_fae import cli


__all__ = ["check", "parses"]

# Training scripts -> their smoke config, which with these flags makes any of their runs tiny.
SMOKE = {
    "cache_latents": "smoke_cache_latents.yaml",
    "train_autoregressive": "smoke_autoregressive.yaml",
    "train_detok": "smoke_detok.yaml",
    "train_drorae": "smoke_drorae.yaml",
    "train_fae": "smoke_fae.yaml",
    "train_few_steps": "smoke_few_steps.yaml",
    "train_generator": "smoke_generator.yaml",
    "train_lora": "smoke_lora.yaml",
    "train_maetok": "smoke_maetok.yaml",
    "train_pixel_decoder": "smoke_pixel_decoder.yaml",
    "train_starflow": "smoke_starflow.yaml",
    "train_text_to_image": "smoke_text_to_image.yaml",
    "train_vae": "smoke_vae.yaml",
}
LOOP = {
    "max_train_steps": 1,
    "logging_steps": 1,
    "validation_steps": 1,
    "checkpointing_steps": 1,
    "lr_warmup_steps": 0,
}
LOOP |= {"train_batch_size": 4, "dataloader_num_workers": 0, "push_to_hub": False}
RELIABILITY = {path.stem for path in (ROOT / "tests" / "reliability").glob("[a-z]*.py")}
IDENTITY = {"latent_channels": 32, "decoder_num_layers": 0}  # the width of the tiny encoder
# In place of weights that no test has: VGG16, ConvNeXt and DINO of the ImageNet recipes.
PIXELS = {
    "perceptual": ["features:facebook/dinov2-small=1.0"],
    "discriminator": "patch",
    "discriminator_channels": 32,
}
TARGETS = {"auxiliary_targets": ["hog=1.0", "dinov2:facebook/dinov2-small=1.0"]}
HEAD = {"head_num_layers": 1, "head_num_attention_heads": 2, "head_attention_head_dim": 20}
EVALUATION = {
    "generation": {"num_samples": 20, "extractors": [f"effnet={JUDGE}"]},
    "reconstruction": {
        "extractors": [f"effnet={JUDGE}"],
        "metrics": ["rfid", "psnr", "ssim", "feature_cosine"],
    },
    "probe": {"probe_steps": 5, "probe_batch_size": 16},
    "latents": {"components": [1, 2], "denoising_steps": 2},
    "matching": {},
    "retrieval": {},
}


class Parsed(BaseException):
    """A program has read its arguments."""


def check(words: list[str], environment: dict[str, str]) -> None:
    """Run a command, or check as far as possible that it would run.

    Raises:
        ValueError, SystemExit, or any error of the command: it does not run.
    """
    if words[0] not in CHECKS:
        raise ValueError(f"tests/document_checks.py knows no way to check {shlex.join(words)!r}")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        CHECKS[words[0]](words[1:])


def check_make(words: list[str]) -> None:
    """The target exists, and the scripts that it would start accept their arguments."""
    result = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        raise ValueError(f"make {shlex.join(words)}: {result.stderr}")
    for script, flags in re.findall(r"^\S*/python (\w+/\S+\.py)(.*)$", result.stdout, flags=re.MULTILINE):
        check_python([script, *shlex.split(flags)])


def check_pip(words: list[str]) -> None:
    """Installs only this package, with existing extras."""
    found = re.fullmatch(r"install -e \.(?:\[([\w,-]+)\])?", " ".join(words))
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    if not found or not {*(found[1] or "dev").split(",")} <= {*setup["options.extras_require"]}:
        raise ValueError(f"pip {shlex.join(words)}: not this package, or an extra that setup.cfg does not have")


def check_hf_fae(words: list[str]) -> None:
    """Runs and writes its output, except for the demo, which would not end, and downloads."""
    if words[0] == "demo" or words[0] == "convert" and "--output" in words:
        parses(lambda: cli.main(words))
        return
    if words[0] == "evaluate" and "--help" not in words:
        given = {word for word in words if word.startswith("--")}
        tiny = EVALUATION[words[1]]
        if words[1] == "reconstruction" and "--metrics" in given:
            tiny = {name: value for name, value in tiny.items() if name != "metrics"}
        if "--denoising_steps" not in given:
            tiny = {name: value for name, value in tiny.items() if name != "denoising_steps"}
        words = [*words, *to_flags({"batch_size": 32, **tiny})]
    if words[0] == "train":
        words = [*words, *to_flags({"tokenizer": "checkpoints/fae-emoji-256", "duration": 1e-5})]
    cli.main(words)
    for flag, value in zip(words, words[1:]):
        if flag in ("--output", "--output_dir"):
            assert Path(value).exists(), value


def check_accelerate(words: list[str]) -> None:
    """`accelerate launch` with known flags; its script runs in this process."""
    arguments = launch_command_parser().parse_args(words[1:])
    if words[0] != "launch":
        raise ValueError(f"accelerate {words[0]}: only launch is known")
    if arguments.module:
        check_python(["-m", arguments.training_script, *arguments.training_script_args])
    else:
        check_python([arguments.training_script, *arguments.training_script_args])


def check_python(words: list[str]) -> None:
    script, *arguments = words
    if script == "-m" and arguments[0] == "hf_fae.cli":
        check_hf_fae(arguments[1:])
    elif script == "-m" and arguments[0] == "pytest":
        missing = [path for path in arguments[1:] if not (ROOT / path).exists()]
        if missing:
            raise ValueError(f"python {shlex.join(words)}: there is no {', '.join(missing)}")
    elif script == "tests/reliability":
        unknown = {word for word in arguments if not word.startswith("--")} - RELIABILITY
        if unknown - {arguments[place + 1] for place, word in enumerate(arguments) if word == "--only"}:
            raise ValueError(f"python {shlex.join(words)}: there is no kind of {', '.join(unknown)}")
    elif Path(script).stem in SMOKE and script.startswith("training_scripts/"):
        train(script, arguments)
    elif script.endswith(".py"):
        parses(lambda: run_script(script, arguments))
    else:
        raise ValueError(f"python {shlex.join(words)}: only scripts, -m hf_fae.cli and -m pytest are known")


def train(script: str, arguments: list[str]) -> None:
    """To the end, in one step on a few images. `...` in a command stands for the reader's choice."""
    smoke = yaml.safe_load((ROOT / "tests" / "configs" / SMOKE[Path(script).stem]).read_text())
    tiny = {**smoke, **DATA, **(LOOP if "max_train_steps" in smoke else {})}
    config = {}
    if ["--config", "..."] in [arguments[index : index + 2] for index in range(len(arguments))]:
        place = arguments.index("--config")
        arguments = [*arguments[:place], *arguments[place + 2 :]]
        tiny |= {"dataset_name": LATENTS[0], "output_dir": "outputs/..."}
        shutil.rmtree("outputs/...", ignore_errors=True)  # of the command before
    elif "--config" in arguments:
        config = yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text())
        if config.get("encoder_type") == "identity":
            tiny |= IDENTITY
        if config.get("perceptual") or config.get("discriminator"):
            tiny |= PIXELS
        if config.get("auxiliary_targets"):
            tiny |= TARGETS
        if config.get("denoiser") in ("dit_dh", "raev2"):
            tiny |= HEAD
        if config.get("base_head_layer"):
            tiny |= {"base_head_layer": 1}
        if config.get("layers"):
            tiny |= {"layers": [0, 2]}
        if config.get("dimension_shift") or config.get("prediction_type") == "epsilon":
            tiny |= {"shift": 1.0}
    given = [folder for flag, folder in zip(arguments, arguments[1:]) if flag == "--output_dir"]
    folder = [config.get("output_dir"), *given][-1]
    if folder is not None and Path(folder, STAND_IN).exists():
        shutil.rmtree(folder)
    AcceleratorState._reset_state(reset_partial_state=True)
    run_script(script, [*arguments, *to_flags(tiny)])


def run_script(script: str, arguments: list[str]) -> None:
    """Like `python SCRIPT ARGUMENTS`, in this process."""
    path = Path(script).absolute()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        patch.syspath_prepend(path.parent)
        runpy.run_path(str(path), run_name="__main__")


def parses(program) -> None:
    """The program accepts its arguments; it is stopped once it has parsed them."""
    parse_args, parse_dataclasses = argparse.ArgumentParser.parse_args, HfArgumentParser.parse_args_into_dataclasses

    def stop(parse):
        def parse_and_stop(self, *args, **kwargs):
            parsed = parse(self, *args, **kwargs)
            if kwargs.get("return_remaining_strings") and parsed[-1]:
                self.error(f"unknown arguments: {' '.join(parsed[-1])}")
            raise Parsed

        return parse_and_stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop(parse_args))
        patch.setattr(HfArgumentParser, "parse_args_into_dataclasses", stop(parse_dataclasses))
        try:
            program()
        except Parsed:
            return
    raise ValueError("the program has read no arguments: it has ended, or runs without")


def to_flags(options: dict) -> list[str]:
    """The values of a config as flags."""
    flags = []
    for name, value in options.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


CHECKS = {
    "accelerate": check_accelerate,
    "hf-fae": check_hf_fae,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
}
