"""Contract 4: guidance is a value. Its scale at each time, and how it combines two predictions.

A scale of 1 is the plain conditional model everywhere; papers on flows write it as 1 + w.
"""

import math
from dataclasses import dataclass
from numbers import Real

import torch


__all__ = ["FlowGuidance", "Guidance", "TokenGuidance"]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance with a scale that depends on the noise time t (1 noise, 0 data).

    Args:
        intervals: `(t_low, t_high, scale)` for t_low < t <= t_high, the lowest one including 0. Outside of all
            intervals the scale is 1: the plain conditional prediction, which needs no second pass.
        channels: number of leading channels to guide (3 in SiT's and LightningDiT's code); `None` for all.

    The three-part schedule of FAE's main results (section 5): `Guidance(((0.9, 1.0, 0.9), (0.0, 0.7, 2.5)))`.

    Raises:
        ValueError: bounds outside [0, 1] or in the wrong order, intervals that overlap, a scale that is not finite.
    """

    intervals: tuple[tuple[float, float, float], ...] = ()
    channels: int | None = None

    def __post_init__(self):
        try:
            intervals = tuple(tuple(float(number) for number in interval) for interval in self.intervals)
        except (TypeError, ValueError):
            raise ValueError(
                f"guidance_scale must be a number or a list of (t_low, t_high, scale), got {self.intervals!r}"
            ) from None
        object.__setattr__(self, "intervals", intervals)
        for interval in intervals:
            if len(interval) != 3 or not 0 <= interval[0] < interval[1] <= 1:
                raise ValueError(
                    f"guidance intervals must be (t_low, t_high, scale) with 0 <= t_low < t_high <= 1, got {interval}"
                )
            if not -float("inf") < interval[2] < float("inf"):
                raise ValueError(f"guidance scale must be finite, got {interval[2]}")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"guidance channels must be positive or None, got {self.channels}")
        ordered = sorted(intervals)
        for (_, high, _), (low, _, _) in zip(ordered, ordered[1:]):
            if low < high:
                raise ValueError(f"guidance intervals must not overlap, got {intervals}")

    @classmethod
    def of(cls, value: "float | list[tuple[float, float, float]] | dict | Guidance") -> "Guidance":
        """Convert user input: a scale for all times, a list of intervals, the fields as a dict, or a `Guidance`.

        Raises:
            ValueError: none of these.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Real) and not isinstance(value, bool):
            return cls() if value == 1 else cls(((0.0, 1.0, value),))
        if isinstance(value, dict) and value.keys() <= {"intervals", "channels"}:
            return cls(**value)
        return cls(value)

    @property
    def is_active(self) -> bool:
        """Whether the scale differs from 1 at any time."""
        return any(scale != 1 for _, _, scale in self.intervals)

    def scale_at(self, t: float) -> float:
        """The scale at noise time t in [0, 1], as fed to the network (after any time shift)."""
        for low, high, scale in self.intervals:
            if low < t <= high or t == low == 0:
                return scale
        return 1.0

    def combine(self, conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
        """unconditional + scale * (conditional - unconditional), predictions (B, C, H, W).

        In AutoGuidance (arXiv 2406.02507) these are predictions of a strong and of a weak model.
        """
        guided = torch.lerp(unconditional, conditional, scale)
        if self.channels is None:
            return guided
        return torch.cat([guided[:, : self.channels], conditional[:, self.channels :]], dim=1)


@dataclass(frozen=True)
class FlowGuidance:
    """Guidance of an autoregressive flow, which predicts a mean and a scale (STARFlow, arXiv 2506.06276).

    Args:
        weight: the paper's w: 0 for no guidance; the paper samples with 3. In a pipeline `guidance_scale` = 1 + w:
            where both predicted scales agree, the rule is ordinary classifier-free guidance.
        rule: `"starflow"`, which never widens the conditional distribution for w >= 0, or for comparison `"tarflow"`
            (arXiv 2412.06329), which extrapolates mean and log-scale and diverges at high weights.

    Raises:
        ValueError: a weight below -1 (the unconditional end) or not finite, or another rule.
    """

    weight: float = 0.0
    rule: str = "starflow"

    def __post_init__(self):
        if not isinstance(self.weight, Real) or not -1 <= self.weight < math.inf:
            raise ValueError(f"guidance weight w must be finite and at least -1, got {self.weight!r}")
        if self.rule not in ("starflow", "tarflow"):
            raise ValueError(f"guidance rule must be 'starflow' or 'tarflow', got {self.rule!r}")

    @classmethod
    def of(cls, value: "float | dict | FlowGuidance") -> "FlowGuidance":
        """Convert user input: a scale, which is 1 + w, the fields as a dict, or a `FlowGuidance`.

        Raises:
            ValueError: none of these, or a scale that is negative or not finite.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, dict) and value.keys() <= {"weight", "rule"}:
            return cls(**value)
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise ValueError(f"guidance_scale must be a finite number from 0, or a FlowGuidance, got {value!r}")
        return cls(value - 1.0)

    @property
    def is_active(self) -> bool:
        """Whether an unconditional pass is needed."""
        return self.weight != 0

    def combine(
        self, mean: torch.Tensor, scale: torch.Tensor, negative_mean: torch.Tensor, negative_scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The guided mean and scale, from the conditional and the unconditional ones; all of one shape.

        With r = min((scale / negative_scale)^2, 1) and D = 1 + w - w r the scale is divided by sqrt(D), and the mean
        moves by w r / D of its distance from the unconditional one (STARFlow, section 3.4).
        """
        if self.rule == "tarflow":
            return mean + self.weight * (mean - negative_mean), scale * (scale / negative_scale) ** self.weight
        ratio = (scale / negative_scale).square().clamp_max(1)
        spread = 1 + self.weight * (1 - ratio)  # D, in a form that rounding never puts below 1
        return mean + self.weight * ratio / spread * (mean - negative_mean), scale * spread.rsqrt()


@dataclass(frozen=True)
class TokenGuidance:
    """Guidance of a model that generates an image token by token (MAR, arXiv 2406.11838; l-DeTok, arXiv 2507.15856).

    Args:
        scale: 1 for no guidance. l-DeTok samples with 3.9 (MAR-B) and 3.4 (MAR-L).
        schedule: `"linear"`, from 1 where no token is known to `scale` where all are, or `"constant"`.

    Raises:
        ValueError: a scale that is negative or not finite, or another schedule.
    """

    scale: float = 1.0
    schedule: str = "linear"

    def __post_init__(self):
        if not isinstance(self.scale, Real) or isinstance(self.scale, bool) or not 0 <= self.scale < math.inf:
            raise ValueError(f"guidance_scale must be a finite number from 0, or a TokenGuidance, got {self.scale!r}")
        if self.schedule not in ("linear", "constant"):
            raise ValueError(f"guidance schedule must be 'linear' or 'constant', got {self.schedule!r}")

    @classmethod
    def of(cls, value: "float | dict | TokenGuidance") -> "TokenGuidance":
        """Convert user input: a scale, the fields as a dict, or a `TokenGuidance`.

        Raises:
            ValueError: none of these.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, dict) and value.keys() <= {"scale", "schedule"}:
            return cls(**value)
        return cls(value)

    @property
    def is_active(self) -> bool:
        """Whether any token is guided."""
        return self.scale != 1

    def scale_at(self, known: float) -> float:
        """The scale for the next tokens at a share `known` of all tokens in [0, 1): `TokenGenerator.guided_share`."""
        return self.scale if self.schedule == "constant" else 1 + (self.scale - 1) * known

    def combine(self, conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
        """unconditional + scale * (conditional - unconditional), of two predictions of the noise."""
        return torch.lerp(unconditional, conditional, scale)
