"""The card of a saved folder, from its configs, its training and the templates in `model_cards/`."""

import os
from pathlib import Path

from .escaping import FILTERS
from .folder_facts import latest_images, load_config, read_folder, text_facts
from .hub_metadata import card_metadata, example_prompts, write_eval_results
from .signed_card import is_generated, sign
from .training_run import TrainingRun


__all__ = ["render_card", "write_card"]

TEMPLATES = Path(__file__).parents[1] / "model_cards"


def write_card(folder: str | Path, run: TrainingRun | None = None, repo_id: str | None = None) -> None:
    """Write `README.md` into a saved folder, and results on Hub data sets into `.eval_results/`.

    An edited `README.md` is kept. Arguments and errors as [`render_card`].
    """
    folder = Path(folder)
    card = render_card(folder, run, repo_id)
    path = folder / "README.md"
    if not path.exists() or is_generated(path.read_text(encoding="utf-8")):
        path.write_text(card, encoding="utf-8")
    write_eval_results(folder, run.results if run else [])


def render_card(folder: str | Path, run: TrainingRun | None = None, repo_id: str | None = None) -> str:
    """The card of a saved pipeline, tokenizer, generator or LoRA.

    Absolute paths in `run` are shortened to their last part: the directories of a machine are private.

    Args:
        folder: where it was saved.
        run: its training. Only with a run does the card show the newest images of `validation/`.
        repo_id: Hub id that the snippet loads; by default the folder.

    Raises:
        ValueError: the folder holds none of these, or a LoRA whose `run` does not name its `base_model`.
    """
    import jinja2

    folder = Path(folder)
    source = repo_id or folder.as_posix()
    kind, facts = read_folder(folder)
    if kind == "lora":
        if not (run and run.base_model):
            raise ValueError(f"run must name the base_model of the LoRA in {str(folder)!r}, got {run}")
        facts |= text_facts(load_config(run.base_model), load_config(run.base_model, "transformer"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS, shorten=_shorten)
    images = [path.relative_to(folder).as_posix() for path in latest_images(folder)] if run else []
    run, name = run or TrainingRun(), source.rstrip("/").split("/")[-1]
    text = environment.get_template(f"{kind}.md").render(
        metadata=card_metadata(kind, facts, run, name).to_yaml(),
        name=name,
        source=source,
        run=run,
        prompts=example_prompts(facts, run),
        images=images,
        **facts,
    )
    return sign(text)


def _shorten(value):
    """The last part of an absolute path; also of `--name=PATH`, and of paths in lists and dicts."""
    if isinstance(value, dict):
        return {key: _shorten(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shorten(item) for item in value]
    if not isinstance(value, str):
        return value
    flag, equals, path = value.rpartition("=") if value.startswith("--") else ("", "", value)
    return flag + equals + (Path(path).name or path if path.startswith("~") or os.path.isabs(path) else path)
