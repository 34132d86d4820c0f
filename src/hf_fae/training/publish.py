"""What a run publishes: its card, and the folder on the Hub; and whether it will be able to, before it starts."""

import math
import sys
from numbers import Real
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from ..cards import Result, TrainingRun, write_card
from ..hub import push_folder
from .arguments import LoopArguments


__all__ = ["check_hub", "publish", "training_run"]

DISTRIBUTED = {DistributedType.MULTI_CPU: "DDP", DistributedType.MULTI_GPU: "DDP", DistributedType.FSDP: "FSDP"}


def check_hub(args: LoopArguments) -> None:
    """With `push_to_hub`, make the repository before the first step, or find out that this cannot be done.

    A dry run makes nothing: it asks who is logged in and whether the repository is theirs.

    Raises:
        ValueError: `hub_model_id` is no repository id or belongs to someone else, nobody is logged in, or the Hub
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
        # `exist_ok` would take anyone's repository, of which no commit can be made.
        if "/" in repo_id and repo_id.split("/")[0] not in owners:
            raise ValueError(f"hub_model_id must belong to one of {owners}, who are logged in, got {repo_id!r}")
        if not args.dry_run:
            api.create_repo(repo_id, private=args.hub_private_repo, exist_ok=True)
    except (OSError, HTTPError) as error:
        raise ValueError(
            f"push_to_hub cannot push to {repo_id!r}; log in with `hf auth login`, or go without: {error}"
        ) from error


def training_run(
    config: dict,
    step: int,
    images_seen: int,
    results: dict | None,
    data=None,
    accelerator: Accelerator | None = None,
) -> TrainingRun:
    """What the card of a run tells.

    Args:
        config: all arguments of the run as plain values.
        step, images_seen: how long it trained.
        results: of its last validation; the finite numbers in it are measurements, "prompts" what it has drawn.
        data: what it trained on, with `facts()`; without it the card has no data and no results.
        accelerator: where it ran.
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


def _script(path: str) -> str:
    """The script's path in its git repository or, outside of one, in the working directory."""
    script = Path(path).resolve()
    root = next((folder for folder in script.parents if (folder / ".git").exists()), Path.cwd())
    return script.relative_to(root).as_posix() if script.is_relative_to(root) else script.name


def _machine(accelerator: Accelerator) -> str:
    count, kind = accelerator.num_processes, DISTRIBUTED.get(accelerator.distributed_type)
    processes = f"{count} process{'es' if count > 1 else ''}" + (f" ({kind})" if kind else "")
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    return f"{processes} on {accelerator.device.type}, in {precision}"
