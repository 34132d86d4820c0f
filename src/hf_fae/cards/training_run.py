"""What a training run adds to a model card."""

from dataclasses import dataclass, field
from typing import Any


__all__ = ["Result", "TrainingRun"]


@dataclass
class Result:
    """One measured number.

    Attributes:
        name: the metric, such as `"psnr"`.
        value: of any numeric type; kept as a float.
        dataset, split: what it was measured on: Hub id or folder.
        protocol: settings that reproduce the measurement: sampler, steps, guidance, number of samples, precision, ...
    """

    name: str
    value: float
    dataset: str
    split: str | None = None
    protocol: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.value = float(self.value)  # YAML has no numpy numbers

    def describe_protocol(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.protocol.items())


@dataclass
class TrainingRun:
    """What a training script knows about its result and the saved files do not state.

    Attributes:
        command: the script and its arguments, as typed.
        machine: the hardware, such as `"2 processes (DDP) on cuda, in bf16"`.
        config: all arguments of the run as plain values.
        datasets: Hub ids or folders of the training data.
        step, images_seen: training length.
        results: measurements of the saved weights.
        prompts: example texts or classes; the first one is in the snippet.
        base_model: Hub id or folder of the pipeline that a LoRA belongs to.
        license: the Hub's identifier of the licence of the weights.
    """

    command: list[str] = field(default_factory=list)
    machine: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    step: int | None = None
    images_seen: int | None = None
    results: list[Result] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    base_model: str | None = None
    license: str | None = None
