"""What a run saves and publishes: the pipeline, the card, the folder on the Hub; and a check before it starts."""

import math
import sys
from numbers import Real
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from ..cards import Result, TrainingRun, write_card
from ..data.protocol import TrainingData
from ..hub import push_folder
from ..utils.hub_errors import explain_hub_error
from .arguments import LoopArguments


__all__ = ["check_hub", "publish", "save_without_encoder", "training_run"]

DISTRIBUTED = {DistributedType.MULTI_CPU: "DDP", DistributedType.MULTI_GPU: "DDP", DistributedType.FSDP: "FSDP"}


def check_hub(args: LoopArguments) -> None:
    """With `push_to_hub`, create the repository before the first step, so that errors show up before the training.

    A dry run creates nothing: it checks that a user is logged in who may write to the repository.

    Raises:
        ValueError: `hub_model_id` is no repository id or belongs to someone else, no user is logged in, or the Hub
            does not answer.
    """
    if not args.push_to_hub:
        return
    repo_id = args.hub_model_id
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"hub_model_id must be a repository such as user/name, got {repo_id!r}: {error}") from error
    api = HfApi()
    try:
        user = api.whoami()
        owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
        # `exist_ok` would accept anyone's repository, which we cannot write to.
        if "/" in repo_id and repo_id.split("/")[0] not in owners:
            raise ValueError(f"hub_model_id must belong to one of {owners}, who are logged in, got {repo_id!r}")
        if not args.dry_run:
            api.create_repo(repo_id, private=args.hub_private_repo, exist_ok=True)
    except (OSError, HTTPError) as error:
        raise ValueError(
            f"push_to_hub cannot push to {repo_id!r}; log in with `hf auth login`, or train without: "
            f"{explain_hub_error(error) or error}"
        ) from error


def training_run(
    config: dict,
    step: int,
    images_seen: int,
    results: dict | None,
    data: TrainingData | None = None,
    accelerator: Accelerator | None = None,
) -> TrainingRun:
    """The facts for the model card of a run.

    Args:
        config: all arguments of the run as plain values.
        step, images_seen: the length of its training.
        results: of its last validation; finite numbers are measurements, "prompts" the classes or captions sampled.
        data: the training data; without them the card names no data set and has no results.
        accelerator: of the run.
    """
    facts = data.facts() if data is not None else {}
    dataset = facts.get("dataset")
    protocol = {
        "resolution": facts.get("resolution"),
        "validation samples": facts.get("validation_samples"),
        "mixed precision": config.get("mixed_precision"),
    }
    protocol = {name: value for name, value in protocol.items() if value is not None}
    numbers = {name: float(value) for name, value in (results or {}).items() if isinstance(value, Real)}
    return TrainingRun(
        command=[_script(sys.argv[0]), *sys.argv[1:]],
        machine=_machine(accelerator) if accelerator is not None else None,
        config=config,
        datasets=[dataset] if dataset else [],
        step=step,
        images_seen=images_seen,
        results=[
            Result(name, value, dataset, facts.get("validation_split"), protocol)
            for name, value in numbers.items()
            if dataset and math.isfinite(value)
        ],
        prompts=list(dict.fromkeys((results or {}).get("prompts", []))),
        base_model=config.get("pipeline"),
        license=config.get("license"),
    )


def publish(args: LoopArguments, run: TrainingRun) -> None:
    """Write the card into `output_dir` and, if `push_to_hub`, upload the folder as `hub_model_id`."""
    write_card(args.output_dir, run, repo_id=args.hub_model_id)
    if args.push_to_hub:
        message = f"Training: {run.step:,} steps"
        push_folder(args.output_dir, args.hub_model_id, private=args.hub_private_repo, commit_message=message)


def save_without_encoder(pipeline: DiffusionPipeline, folder: str) -> None:
    """Save a pipeline without its tokenizer's frozen encoder, which generation does not need."""
    if hasattr(pipeline.vae, "image_encoder"):
        pipeline.vae.image_encoder = None
    pipeline.save_pretrained(folder)


def _script(path: str) -> str:
    """The script's path relative to its git repository or, outside of one, to the working directory."""
    script = Path(path).resolve()
    root = next((folder for folder in script.parents if (folder / ".git").exists()), Path.cwd())
    return script.relative_to(root).as_posix() if script.is_relative_to(root) else script.name


def _machine(accelerator: Accelerator) -> str:
    count, kind = accelerator.num_processes, DISTRIBUTED.get(accelerator.distributed_type)
    processes = f"{count} process{'es' if count > 1 else ''}" + (f" ({kind})" if kind else "")
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    return f"{processes} on {accelerator.device.type}, in {precision}"
