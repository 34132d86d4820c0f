"""What a denoiser predicts at x_t = (1 - t) x + t eps, and the velocity eps - x that follows from it."""

import torch


__all__ = ["check_prediction_type", "to_velocity"]

# Predictions of flow matching: the velocity itself, or the clean latents, which diffusers calls the sample.
FLOW_PREDICTIONS = ("velocity", "sample")
# Below it a velocity is computed as if at this time (RAEv2's code): clean latents say little of a noise that is gone.
MIN_TIME = 0.05


def check_prediction_type(prediction_type: str, *others: str) -> None:
    """Refuse what is neither a prediction of flow matching nor one of `others`.

    Raises:
        ValueError: another one.
    """
    allowed = (*FLOW_PREDICTIONS, *others)
    if prediction_type not in allowed:
        names = ", ".join(map(repr, allowed[:-1]))
        raise ValueError(f"prediction_type must be {names} or {allowed[-1]!r}, got {prediction_type!r}")


def to_velocity(
    prediction_type: str, prediction: torch.Tensor, hidden_states: torch.Tensor, times: torch.Tensor
) -> torch.Tensor:
    """The velocity of a prediction: itself, or (x_t - x) / max(t, 0.05) of clean latents x.

    Args:
        prediction_type: `"velocity"` or `"sample"`.
        prediction, hidden_states: what was predicted and the noisy latents x_t, both (B, C, H, W).
        times: noise times t in [0, 1], (B,) or a scalar tensor.
    """
    if prediction_type == "velocity":
        return prediction
    times = times.to(prediction.dtype).clamp_min(MIN_TIME).view(-1, *[1] * (prediction.ndim - 1))
    return (hidden_states - prediction) / times
