"""The recipes as data, and which one suits a folder."""

from copy import deepcopy
from pathlib import Path

import yaml


__all__ = ["RECIPES", "choose_recipe", "load_recipe"]

FOLDER = Path(__file__).with_name("recipes")
RECIPES = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
LARGE = 5000  # images from which a tokenizer of one's own pays off


def choose_recipe(num_images: int) -> str:
    """`folder_small` below 5,000 images, else `folder_large`."""
    return "folder_small" if num_images < LARGE else "folder_large"


def load_recipe(name: str, device: str, duration: float) -> dict[str, dict]:
    """Stage -> arguments of its script.

    Args:
        name: one of `RECIPES`.
        device: "cuda" or "cpu".
        duration: factor of all numbers of steps.
    """
    recipe = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    stages = deepcopy(recipe["stages"])
    if device == "cuda":
        for stage, overrides in recipe["gpu"].items():
            stages[stage] |= overrides
    for settings in stages.values():
        if "max_train_steps" in settings:
            steps = settings["max_train_steps"] = max(1, round(settings["max_train_steps"] * duration))
            settings["lr_warmup_steps"] = min(settings["lr_warmup_steps"], steps // 10)
    return stages
