"""The whole run: look, plan, train stage by stage, write the page; the same call resumes it."""

import shutil
from pathlib import Path

from ..utils.locks import lock_folder
from .estimate import estimate
from .folder import read_folder
from .models import check_models
from .page import write_page
from .plan import Request, make_plan, open_plan, store_plan
from .rows import split, write_rows
from .stages import is_finished, make_stages, run_stage


__all__ = ["train_folder"]

SMALLEST = 200  # images below which a generator mostly repeats them


def train_folder(request: Request, output: Path, dry_run: bool = False) -> None:
    """Train a generator on a folder of images.

    Args:
        output: `rows/`, a folder for each stage, `samples.png` and `index.html`; `generator/` is the pipeline.
        dry_run: print the plan, write nothing.

    Raises:
        ValueError: the folder or an argument cannot be used, or `output` holds another run.
    """
    plan = open_plan(request, output)
    resumed = plan is not None
    folder = None
    if not (output / "rows").is_dir() or dry_run or not resumed:
        folder = read_folder(request.folder)
        plan = plan or make_plan(request, folder)
        check_models(plan)
    stages = make_stages(plan, output)
    print("\n".join(plan.notes))
    print(
        f"recipe {plan.recipe}, {plan.resolution} px, crop {plan.crop}, condition: {plan.condition}, "
        f"on {plan.device}, precision {'fp32' if plan.mixed_precision == 'no' else plan.mixed_precision}"
    )
    print(f"tokenizer: {plan.tokenizer or 'a new one on ' + plan.image_encoder}")
    if folder is not None:
        if len(folder.images) < SMALLEST:
            print(f"fewer than {SMALLEST} images: expect samples that repeat them")
        parts = split(folder, plan.condition)
        print(f"{len(parts['train']):,} images to train on, {len(parts['validation']):,} to validate on")
        print("\n".join(estimate(plan, len(folder.images)).describe()), flush=True)
    if dry_run:
        return
    output.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(output, "output")
    try:
        if not resumed:
            store_plan(request, plan, output)
        if folder is not None:
            write_rows(folder, plan.condition, output / "rows")
        for number, stage in enumerate(stages, 1):
            done = is_finished(stage)
            print(f"\n== {number} of {len(stages)}: {stage.name}{' (finished before)' if done else ''}", flush=True)
            if not done:
                run_stage(stage)
        samples = sorted((output / "generator" / "validation").glob("samples-*.png"))
        shutil.copyfile(samples[-1], output / "samples.png")
        write_page(output / "index.html", plan, stages, _usage(plan, output))
        print(f"\nthe generator is {output / 'generator'}; open {output / 'index.html'}")
    finally:
        lock.release()


def _usage(plan, output):
    pipeline = "FAETextToImagePipeline" if plan.condition == "captions" else "FAEDiTPipeline"
    prompt = {"captions": '"a caption"', "none": '"image"'}.get(plan.condition, "next(iter(pipe.label2id))")
    return (
        f"from hf_fae import {pipeline}\n\npipe = {pipeline}.from_pretrained({str(output / 'generator')!r})\n"
        f"image = pipe({prompt}).images[0]"
    )
