"""What the Hub reads of a model: the YAML head of its card, and `.eval_results/` for the leaderboards."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from .folder_facts import is_hub_id, load_config
from .training_run import Result, TrainingRun


__all__ = ["EVAL_RESULTS", "card_metadata", "example_prompts", "write_eval_results"]

EVAL_RESULTS = ".eval_results/hf_fae.yaml"
PIPELINE_TAGS = {"tokenizer": "image-feature-extraction"}
GENERATION_TAG = "unconditional-image-generation"  # the tag of other class-conditional generators on the Hub
PROMPT = "a teddy bear"  # in the snippet if the run names none
DINOV3_LICENSE = {
    "license": "other",
    "license_name": "dinov3-license",
    "license_link": "https://ai.meta.com/resources/models-and-libraries/dinov3-license",
}


def card_metadata(kind: str, facts: dict[str, Any], run: TrainingRun, name: str) -> ModelCardData:
    """The YAML head. It names Hub ids alone: the Hub turns them into links."""
    tag = "text-to-image" if facts.get("reads_text") else PIPELINE_TAGS.get(kind, GENERATION_TAG)
    base_model = run.base_model if kind == "lora" else facts["encoder_id"]
    results = [
        EvalResult(
            task_type=tag,
            dataset_type=result.dataset,
            dataset_name=result.dataset.split("/")[-1],
            dataset_split=result.split,
            metric_type=_identifier(result.name),
            metric_name=result.name,
            metric_value=result.value,
            metric_args=result.protocol or None,
        )
        for result in _results_on_hub(run.results)
    ]
    return ModelCardData(
        **_licence(facts, run),
        library_name="diffusers",
        pipeline_tag=tag,
        tags=["hf_fae", "lora"] if kind == "lora" else ["hf_fae"],
        base_model=base_model if base_model and is_hub_id(base_model) else None,
        base_model_relation="adapter" if kind == "lora" and is_hub_id(base_model) else None,
        widget=[{"text": prompt} for prompt in example_prompts(facts, run)] or None,
        datasets=[dataset for dataset in run.datasets if is_hub_id(dataset)] or None,
        **({"model_name": name, "eval_results": results} if results else {}),
    )


def example_prompts(facts: dict[str, Any], run: TrainingRun) -> list[str]:
    """Example texts of a pipeline that reads text; the Hub's own snippet uses the first one."""
    return (run.prompts or [PROMPT]) if facts.get("reads_text") else []


def write_eval_results(folder: Path, results: list[Result]) -> None:
    """Write results on Hub data sets to `.eval_results/`, in place of those of earlier weights."""
    entries = [
        EvalResultEntry(r.dataset, _identifier(r.name), r.value, notes=r.describe_protocol() or None)
        for r in _results_on_hub(results)
    ]
    path = folder / EVAL_RESULTS
    path.unlink(missing_ok=True)
    if entries:
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))


def _licence(facts, run):
    if run.license:
        return {"license": run.license}
    if facts["origins"]:
        licences = [origin["license"] for origin in facts["origins"]]
        return {"license": "unknown" if None in licences else licences[0]}
    encoder = facts["encoder"] or load_config(run.base_model, "vae").get("image_encoder_config") or {}
    encoder = encoder.get("model", {})
    names = (encoder.get("model_type"), encoder.get("architecture"))  # of transformers, of timm
    return DINOV3_LICENSE if any("dinov3" in (name or "") for name in names) else {}


def _results_on_hub(results):
    return [result for result in results if is_hub_id(result.dataset)]


def _identifier(metric):
    return metric.lower().replace(" ", "_")
