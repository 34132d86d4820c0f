"""What all evaluations are told."""

from dataclasses import dataclass, field
from typing import Literal

import torch


__all__ = ["DTYPES", "EvaluationArguments", "TokenizerArguments", "check_positive"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class EvaluationArguments:
    """What to evaluate, and where to keep the result."""

    model: str = field(metadata={"help": "Hub id or folder of what is evaluated."})
    output_dir: str = field(
        metadata={"help": "Folder of the report; one that was interrupted goes on when it is started again."}
    )
    batch_size: int = field(default=64, metadata={"help": "Images that the model works on at a time, per process."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Precision of the model; judges compute in fp32, metrics in fp64."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of all random numbers."})

    def __post_init__(self):
        check_positive(batch_size=self.batch_size)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2^32 - 1, got {self.seed}")


@dataclass
class TokenizerArguments(EvaluationArguments):
    """Which tokenizer to evaluate, and where to keep the result."""

    encoder: str | None = field(
        default=None, metadata={"help": "Frozen encoder (Hub id or folder), where the tokenizer comes without it."}
    )


def check_positive(**counts: int | None) -> None:
    """Refuse what is no number of things; None stands for a default.

    Raises:
        ValueError: the message names the argument and its value.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
