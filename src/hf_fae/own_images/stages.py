"""The stages of a run: training scripts with their arguments, each finished once."""

import importlib.util
import json
import time
from dataclasses import dataclass
from pathlib import Path

from ..utils.atomic import atomic_write
from .plan import Plan
from .recipe import load_recipe


__all__ = ["Stage", "is_finished", "make_stages", "run_stage"]

SCRIPTS = Path(__file__).resolve().parents[1] / "training_scripts"
MARK = "finished.json"
CAPTION_LENGTH = 32  # tokens: a sentence; attention to long padding would cost more than the image
SCRIPT_OF = {
    "features": "train_fae",
    "pixels-ib": "train_pixel_decoder",
    "pixels": "train_pixel_decoder",
    "latents": "cache_latents",
    "generator": "train_generator",
}


@dataclass(frozen=True)
class Stage:
    """A script of `training_scripts/`, the folder of its results, and its arguments."""

    name: str
    script: str
    folder: Path
    arguments: tuple[str, ...]


def make_stages(plan: Plan, output: Path) -> list[Stage]:
    """All stages of a plan, in order."""
    recipe = load_recipe(plan.recipe, plan.device, plan.duration)
    if plan.tokenizer is not None:  # it is there: only its pixel decoder is trained, as the last stage of a new one is
        recipe = {name: settings for name, settings in recipe.items() if name not in ("features", "pixels-ib")}
    return [_make_stage(name, settings, plan, output) for name, settings in recipe.items()]


def is_finished(stage: Stage) -> bool:
    """Whether the stage has ended well.

    Raises:
        ValueError: with other arguments.
    """
    mark = stage.folder / MARK
    if not mark.is_file():
        return False
    if json.loads(mark.read_text())["arguments"] != list(stage.arguments):
        raise ValueError(f"output has finished {stage.name!r} with other arguments: pass another output")
    return True


def run_stage(stage: Stage) -> None:
    """Run the script's `main` in this process, so that a kill ends both, and mark the stage as finished."""
    spec = importlib.util.spec_from_file_location(f"hf_fae_{stage.script}", SCRIPTS / f"{stage.script}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    start = time.monotonic()
    script.main(list(stage.arguments))
    mark = {"arguments": list(stage.arguments), "seconds_of_last_session": round(time.monotonic() - start, 1)}
    atomic_write(stage.folder / MARK, json.dumps(mark, indent=1))


def _make_stage(name, settings, plan, output):
    rows = str(output / "rows")
    encoder = {"image_encoder": plan.image_encoder} if plan.image_encoder else {}
    label = "caption_column" if plan.condition == "captions" else "label_column"
    column = {label: label.removesuffix("_column")}
    images = {"dataset_name": rows, "resolution": plan.resolution, "crop": plan.crop}
    loop = {"checkpoints_total_limit": 1, "resume_from_checkpoint": "latest", "report_to": "none"}
    script = SCRIPT_OF[name]
    if name == "features":
        inputs = {**images, **encoder, **loop}
    elif name == "pixels-ib":
        inputs = {"fae": output / "features", **images, **loop}
    elif name == "pixels" and plan.tokenizer is None:
        inputs = {"fae": output / "features", "pixel_decoder": output / "pixels-ib", **images, **loop}
    elif name == "pixels":
        inputs = {"fae": plan.tokenizer, **images, **encoder, **loop}
    elif name == "latents":
        text = {"text_encoder": plan.text_encoder, "max_caption_length": CAPTION_LENGTH}
        reading = text if plan.text_encoder else {}
        inputs = {"vae": output / "pixels", **images, **column, **reading}
    else:
        inputs = {"dataset_name": output / "latents", **loop}
        if plan.condition == "captions":
            script = "train_text_to_image"
    if name != "latents":
        inputs["logging_steps"] = min(50, settings["max_train_steps"])
    values = {**settings, **inputs, "seed": plan.seed, "mixed_precision": plan.mixed_precision}
    values["output_dir"] = output / name
    arguments = tuple(text for key, value in values.items() for text in (f"--{key}", str(value)))
    return Stage(name, script, output / name, arguments)
