"""The arguments that all evaluations share."""

from dataclasses import dataclass, field
from typing import Literal


__all__ = ["CHUNK", "DTYPES", "EvaluationArguments", "TokenizerArguments", "check_positive"]

CHUNK = 32  # images that a network sees at a time, whatever the batch size: features do not depend on it
DTYPES = ("float32", "bfloat16", "float16")  # names in torch


@dataclass
class EvaluationArguments:
    """The model to evaluate, and the folder of the result."""

    model: str = field(metadata={"help": "Hub id or folder of the model to evaluate."})
    output_dir: str = field(
        metadata={"help": "Folder of the report; an interrupted evaluation resumes when it is started again."}
    )
    batch_size: int = field(default=64, metadata={"help": "Images per batch and process."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={"help": "Precision of the model; extractors compute in fp32, metrics in fp64."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of all random numbers."})

    def __post_init__(self):
        check_positive(batch_size=self.batch_size)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2^32 - 1, got {self.seed}")


@dataclass
class TokenizerArguments(EvaluationArguments):
    """The tokenizer to evaluate, and the folder of the result."""

    encoder: str | None = field(
        default=None, metadata={"help": "Frozen encoder (Hub id or folder) of a tokenizer that was saved without it."}
    )


def check_positive(**counts: int | None) -> None:
    """Require positive counts; None stands for a default.

    Raises:
        ValueError: the message names the argument and its value.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
