"""Comparisons of published weights, and of what the reference code computes with them, with ours."""

import json
from pathlib import Path

import numpy as np
import torch


def arrays(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of an oracle's npz file."""
    return {name: torch.from_numpy(array) for name, array in np.load(path).items()}


def assert_parity(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to a share `tolerance` of the largest expected value."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"off by {error:.2g} of the scale"


def assert_round_trip(table, model: torch.nn.Module, rounded: tuple[str, ...] = ()) -> None:
    """Weights go to the published layout and back to the bit, those of `rounded` to fp32's last one; statistics of
    latents have no place in it."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("latents_")}
    back = table.to_ours(table.to_published(state))
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        if name in rounded:
            torch.testing.assert_close(back[name], tensor, rtol=0, atol=1.2e-7 * float(tensor.abs().max()))
        else:
            assert torch.equal(back[name], tensor), name


def published_shapes(path: Path) -> dict[str, torch.Tensor]:
    """A published state dict on the meta device, from its list of keys and shapes."""
    return {name: torch.empty(shape, device="meta") for name, shape in json.loads(path.read_text()).items()}
