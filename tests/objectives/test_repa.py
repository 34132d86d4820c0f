"""REPA against its reference code; which blocks and batches it reads, and what it trains."""

import numpy as np
import pytest
import torch
from factories import tiny_encoder, tiny_fae, tiny_lightning_dit, tiny_mar, tiny_mmdit, tiny_raev2_dit
from objective_inputs import batch, numbers
from torch import nn

from hf_fae.generators.diffusion_head import head_scheduler
from hf_fae.objectives.flow_matching import FlowMatchingObjective
from hf_fae.objectives.mean_flow import MeanFlowObjective
from hf_fae.objectives.repa import REPA, repa_loss
from hf_fae.objectives.token_diffusion import MARObjective


@pytest.fixture(scope="module")
def values(oracle):
    with np.load(oracle("repa") / "repa.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def test_loss(values):
    projected = values["projected"].clone().requires_grad_()
    loss = repa_loss(projected, values["features"])
    torch.testing.assert_close(loss, values["proj_loss_single"].to(loss))
    loss.backward()
    torch.testing.assert_close(projected.grad, values["grad_projected"])
    two = (repa_loss(values["projected2"], values["features2"]) + loss) / 2
    torch.testing.assert_close(two, values["proj_loss_two"].to(two))
    zeroed = values["projected"].clone()
    zeroed[0, 0] = 0
    found = repa_loss(zeroed, values["features"])
    torch.testing.assert_close(found, values["proj_loss_zero_token"].to(found))


class Condition(nn.Module):
    """Texts of the batch."""

    def forward(self, batch, dropped=None):
        return {"encoder_hidden_states": batch["embeds"]}


def make(kind, **kwargs):
    if kind == "MMDiT":
        objective = FlowMatchingObjective(tiny_mmdit(), tiny_fae(), condition=Condition())
    elif kind == "MeanFlow":
        objective = MeanFlowObjective(tiny_lightning_dit(use_meanflow=True), tiny_fae())
    else:
        model = {"LightningDiT": tiny_lightning_dit, "RAEv2": tiny_raev2_dit}[kind]()
        objective = FlowMatchingObjective(model, tiny_fae())
    torch.manual_seed(0)
    return objective, REPA(objective, 32, tiny_encoder(), layer=1, **kwargs)


def examples():
    return {**batch(), "embeds": torch.randn(4, 5, 24)}


@pytest.mark.parametrize("kind", ["LightningDiT", "RAEv2", "MMDiT", "MeanFlow"])
def test_it_is_added_to_the_loss(kind):
    objective, repa = make(kind, weight=0.5)
    inputs, tokens = examples(), []
    objective.model.blocks[0].register_forward_hook(
        lambda block, args, output: tokens.append(output[0] if isinstance(output, tuple) else output)
    )
    with_repa = objective(inputs, numbers())
    features = repa.encoder(inputs["pixel_values"], (4, 4)).last_hidden_state
    expected = repa_loss(repa.projector(tokens[-1][:, :16]), features)
    torch.testing.assert_close(with_repa["repa"], expected)
    repa.weight = 0.0
    torch.testing.assert_close(with_repa["loss"], objective(inputs, numbers())["loss"] + 0.5 * expected)


def test_what_is_trained():
    """The blocks up to the projector and what comes before them; the encoder and later blocks by nothing of it."""
    objective, repa = make("LightningDiT")
    losses = objective.train()(examples(), numbers())
    losses["repa"].backward()
    reached = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(name.startswith("model.blocks.0.") for name in reached)
    assert any(name.startswith("repa.projector.") for name in reached)
    assert not any(name.startswith(("model.blocks.1.", "model.proj_out", "repa.encoder")) for name in reached)
    groups = objective.parameter_groups()
    assert [group.get("name") for group in groups] == [None, "repa"]
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in objective.model.parameters() if p.requires_grad}
    assert not repa.encoder.training


def test_the_cosine_rises():
    objective, _ = make("LightningDiT", weight=1.0)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], 1e-3)
    inputs, losses = examples(), []
    for _ in range(12):
        loss = objective.train()(inputs, numbers())
        loss["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss["repa"].item())
    assert losses[-1] < losses[0] - 0.2


def test_cached_features_and_validation():
    objective, repa = make("LightningDiT")
    inputs = examples()
    direct = objective(inputs, numbers())["repa"]
    tokens = repa.encoder(inputs["pixel_values"], (4, 4)).last_hidden_state
    repa.encoder = None
    cached = {**inputs, "features": tokens.transpose(1, 2).unflatten(2, (4, 4))}
    torch.testing.assert_close(objective(cached, numbers())["repa"], direct)
    fine = {**inputs, "features": cached["features"].repeat_interleave(2, 2).repeat_interleave(2, 3)}
    torch.testing.assert_close(objective(fine, numbers())["repa"], direct)  # on a finer grid
    with torch.no_grad():  # validation has no features
        assert "repa" not in objective.eval()(inputs, numbers())


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="repa_layer must be from 1 to the number of blocks 2, got 3"):
        REPA(FlowMatchingObjective(tiny_lightning_dit(), tiny_fae()), 32, tiny_encoder(), layer=3)
    with pytest.raises(ValueError, match="repa_weight must be finite and not negative, got -1"):
        make("LightningDiT", weight=-1.0)
    mar = tiny_mar()
    objective = MARObjective(mar, tiny_fae(), scheduler=head_scheduler())
    with pytest.raises(ValueError, match="repa requires a denoiser, got a MARTransformer2DModel"):
        REPA(objective, 32, tiny_encoder(), layer=1)
