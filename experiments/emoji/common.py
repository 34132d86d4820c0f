"""What all scripts on emoji share: where encoder, data and configs are, and how stages run as processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hf_fae.utils.precision import has_fast_bf16


__all__ = [
    "CLASSES",
    "ENCODER",
    "ROOT",
    "find_asset",
    "find_judge",
    "find_sources",
    "has_fast_bf16",
    "last_value",
    "run",
    "run_cli",
    "run_python",
    "to_flags",
]

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "training_scripts"
CONFIGS = Path(__file__).parent / "configs"
ASSETS = Path(os.environ.get("HF_FAE_ASSETS", ROOT.parent / "shared" / "assets"))
ENCODER = "facebook/dinov2-small"

# Classes to sample: a choice of Fluent Emoji's 97 subgroups.
CLASSES = [
    "face-smiling",
    "cat-face",
    "heart",
    "animal-mammal",
    "animal-bird",
    "plant-flower",
    "food-fruit",
    "food-sweet",
    "sky & weather",
    "transport-ground",
    "clothing",
    "person-role",
]


def find_asset(name: str) -> str | None:
    """A folder of the offline assets, if it exists."""
    path = ASSETS / name
    return str(path) if path.is_dir() else None


def find_sources(encoder: str | None, data: str | None) -> tuple[str, str]:
    """The frozen encoder and the data: as given, else from the assets, else the encoder from the Hub.

    Raises:
        SystemExit: either is missing.
    """
    encoder = encoder or find_asset("dinov2-small") or ENCODER
    data = data or find_asset("fluent-emoji")
    if data is None or not is_reachable(encoder):
        sys.exit(
            "DINOv2-small and Fluent Emoji are needed: set HF_FAE_ASSETS to the folder that holds dinov2-small/ and "
            "fluent-emoji/, or pass --encoder PATH_OR_ID --data PATH_OR_ID (make demo-train ARGS='...')."
        )
    return encoder, data


def find_judge(judge: str | None) -> str:
    """EfficientNet-Lite0, the feature extractor of `fid_effnet`: as given, else from the assets.

    Raises:
        SystemExit: it is missing.
    """
    if found := judge or find_asset("efficientnet-lite0"):
        return found
    sys.exit("--judge must name EfficientNet-Lite0, or HF_FAE_ASSETS the folder that holds efficientnet-lite0/")


def is_reachable(model: str) -> bool:
    """Whether a model is a folder, in the cache, or on a Hub that responds."""
    from huggingface_hub import hf_hub_download

    if os.path.isdir(model):
        return True
    try:
        return bool(hf_hub_download(model, "config.json"))
    except Exception:  # whatever the failure, the remedy is the same
        return False


def run(script: str | Path, config: str, output: Path, arguments: list) -> None:
    """Run a training script with a config of `configs/` in a process of its own.

    Args:
        script: name in `training_scripts/`, or an absolute path.
        arguments: further flags and values, of any type with a `str`.
    """
    print(f"\n== {Path(script).name} with {config}", flush=True)
    run_python([SCRIPTS / script, "--config", CONFIGS / config, "--output_dir", output, *arguments])


def run_cli(arguments: list) -> None:
    """Run `hf-fae` in a process of its own."""
    run_python(["-m", "hf_fae.cli", *arguments])


def run_python(arguments: list) -> None:
    """Run Python with these arguments.

    Raises:
        subprocess.CalledProcessError: it fails.
    """
    # Threads that sleep while they wait lose little on idle cores, and are far faster than spinning on shared ones.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    subprocess.run([sys.executable, *map(str, arguments)], check=True, env=environment)


def to_flags(settings: dict) -> list[str]:
    """Settings as flags; a list gives several values."""
    return [
        text
        for key, value in settings.items()
        for text in (f"--{key}", *map(str, value if isinstance(value, list) else [value]))
    ]


def last_value(run: Path, name: str) -> float:
    """The last value of a metric in the log of a run."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [entry[name] for entry in entries if name in entry][-1]
