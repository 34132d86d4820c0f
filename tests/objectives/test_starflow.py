import math

import pytest
import torch
from factories import tiny_fae, tiny_kl, tiny_starflow
from objective_inputs import batch, numbers, trained
from torch import nn

from hf_fae.generators.starflow import STARFlowOutput
from hf_fae.objectives.starflow import STARFlowObjective


class Recorder(nn.Module):
    """The identity flow, which records the labels that it is called with."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"num_classes": 10, "noise_sigma": 0.3})

    def forward(self, hidden_states, class_labels, output_block_inputs):
        self.labels = class_labels
        tokens = hidden_states.flatten(2)
        return STARFlowOutput(hidden_states, torch.zeros(len(tokens)), (tokens, 2 * tokens))


class TestSTARFlowObjective:
    def test_trains_the_flow(self):
        parts = trained(STARFlowObjective(tiny_starflow(), tiny_fae()))
        assert parts == {"model.blocks", "model.class_embedding"}

    @pytest.mark.parametrize("make", [tiny_fae, tiny_kl])
    def test_terms(self, make):
        model, inputs = tiny_starflow(noise_sigma=0.5), batch()
        objective = STARFlowObjective(model, make(), latent_norm_weight=0.25).eval()
        losses = objective(inputs, numbers(3))
        random = numbers(3)
        noisy = objective.latents(inputs, random)
        noisy = noisy + 0.5 * random.normal(*noisy.shape)
        output = model(noisy, inputs["class_labels"], output_block_inputs=True)
        nll = (0.5 * output.sample.square().sum() - output.log_det.sum()) / noisy.numel()
        norm = sum(tokens.square().mean() for tokens in output.block_inputs)
        torch.testing.assert_close(losses["latent_norm"], norm)
        torch.testing.assert_close(losses["loss"], nll + 0.25 * norm)
        bits = (nll + 0.5 * math.log(2 * math.pi)) / math.log(2)
        torch.testing.assert_close(losses["bits_per_dim"], bits)

    def test_bits_of_a_standard_normal(self):
        """Its entropy is log2(sqrt(2 pi e)) = 2.0471 bits."""
        objective = STARFlowObjective(Recorder(), tiny_fae(), latent_norm_weight=0.0)
        objective.latents = lambda batch, random: math.sqrt(1 - 0.3**2) * torch.randn(4000, 4, 4, 4)
        losses = objective({"class_labels": torch.zeros(4000, dtype=torch.long)}, numbers())
        assert losses["bits_per_dim"].item() == pytest.approx(2.0471, abs=0.01)
        assert losses["loss"].item() == pytest.approx(0.5, abs=0.01)
        assert losses["latent_norm"].item() == pytest.approx(5.0, abs=0.1)

    def test_dropped_labels_reach_the_null_class(self):
        objective = STARFlowObjective(Recorder(), tiny_fae(), label_dropout=0.1)
        objective.latents = lambda batch, random: torch.zeros(8000, 4, 1, 1)
        inputs = {"class_labels": torch.full((8000,), 3)}
        for training, share in ((True, 0.1), (False, 0.0)):
            objective.training = training
            objective(inputs, numbers())
            assert set(objective.model.labels.tolist()) == ({3, 10} if training else {3})
            assert (objective.model.labels == 10).float().mean().item() == pytest.approx(share, abs=0.02)

    def test_one_step_moves_the_weights(self):
        """Against the switch that the reference code ships with, which keeps its optimiser from stepping."""
        model = tiny_starflow()
        before = model.blocks[0].proj_out.weight.detach().clone()
        objective = STARFlowObjective(model, tiny_fae()).train()
        optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], 1e-3)
        objective(batch(), numbers())["loss"].backward()
        optimizer.step()
        assert not torch.equal(model.blocks[0].proj_out.weight, before)
