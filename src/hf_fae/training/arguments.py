"""The arguments that all training scripts share, filled from a YAML file and from flags."""

from dataclasses import dataclass, field
from typing import Literal


__all__ = ["LoopArguments"]


@dataclass
class LoopArguments:
    """How to train, whatever the objective."""

    output_dir: str = field(metadata={"help": "Folder of the run: log, checkpoints, validation images, the result."})
    max_train_steps: int = field(default=100_000, metadata={"help": "Number of optimiser steps."})
    train_batch_size: int = field(default=32, metadata={"help": "Images per process and forward pass."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes per optimiser step."})
    optimizer: Literal["adamw", "muon"] = field(
        default="adamw",
        metadata={"help": "muon: Muon for matrices, AdamW for the rest, at one learning rate (RAEv2)."},
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's decay of the first moment."})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's decay of the second moment."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay."})
    lr_scheduler: Literal["constant", "cosine"] = field(
        default="constant", metadata={"help": "Learning rate after the warm-up: constant, or a cosine decay."}
    )
    min_learning_rate: float = field(default=0.0, metadata={"help": "Learning rate at the end of the cosine."})
    lr_warmup_steps: int = field(default=0, metadata={"help": "Steps over which the learning rate rises linearly."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Clip the gradient to this norm; 0: do not clip."})
    max_nonfinite_steps: int = field(
        default=10,
        metadata={"help": "Steps whose gradient is not finite are skipped; stop after this many in a row."},
    )
    max_corrupt_share: float = field(
        default=0.1, metadata={"help": "Corrupt rows are replaced; stop if their share exceeds this one."}
    )
    ema_decay: float = field(
        default=0.9999,
        metadata={"help": "Decay of the averaged weights, which are validated and saved; 0: none."},
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = field(default="no", metadata={"help": "Autocast precision."})
    allow_tf32: bool = field(default=False, metadata={"help": "fp32 matrix products in TF32 on a GPU that has it."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Trade compute for activation memory."})
    compile: bool = field(default=False, metadata={"help": "Compile the objective with torch.compile."})
    seed: int = field(default=0, metadata={"help": "Seed of initial weights, data order and all noise."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that decode images, per rank."})
    process_timeout: int = field(
        default=600,
        metadata={"help": "Seconds that a process waits in a step for another that hangs; preparations may take 6 h."},
    )
    logging_steps: int = field(
        default=50, metadata={"help": "Log every N steps; in between the host does not synchronise with the device."}
    )
    validation_steps: int = field(default=1000, metadata={"help": "Validate every N steps, and at the end."})
    checkpointing_steps: int = field(
        default=1000, metadata={"help": "Write a checkpoint every N steps, and at the end."}
    )
    checkpoints_total_limit: int | None = field(default=None, metadata={"help": "Keep the newest N; none: keep all."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint folder, or 'latest': the newest one in output_dir, if any."}
    )
    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = field(
        default="tensorboard", metadata={"help": "Tracker in addition to log.jsonl, if it is installed."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the result with its card at the end."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository for the result, such as user/name."})
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Make a new repository private; none: the default of your account."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence of the trained weights, as the Hub names it, for the card."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Set everything up, run one step and one validation, write nothing."}
    )

    def __post_init__(self):
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(
                f"min_learning_rate must be from 0 to learning_rate {self.learning_rate}, got {self.min_learning_rate}"
            )
        for name in ("process_timeout", "max_train_steps", "logging_steps", "validation_steps", "checkpointing_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("hub_model_id must name the repository for push_to_hub, got None")
