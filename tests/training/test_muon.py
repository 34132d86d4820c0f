import pytest
import torch
from torch import nn
from training_runs import Regression, run

from hf_fae.training.muon import MuonWithAdamW


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3, bias=False))


def train(model, *optimizers, steps=3):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        model(torch.randint(5, (8,), generator=generator)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_each_part_is_updated_as_by_torch():
    """Matrices (tables and output layers among them) as by torch's Muon, the rest as by its AdamW."""
    model = network()
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    found = train(model, MuonWithAdamW(model.parameters(), **settings))
    model = network()
    matrices, rest = ([p for p in model.parameters() if (p.ndim == 2) == wanted] for wanted in (True, False))
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    expected = train(model, muon, torch.optim.AdamW(rest, **settings))
    assert len(matrices) == 3 and len(rest) == 3
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_each_group_has_its_rate_and_all_its_parameters():
    model = network()
    groups = [{"params": list(model[:2].parameters())}, {"params": list(model[2:].parameters()), "lr": 0.0}]
    optimizer, before = MuonWithAdamW(groups, lr=1e-2), [p.detach().clone() for p in model.parameters()]
    after = train(model, optimizer)
    changed = [not torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert changed == [True] * 3 + [False] * 3
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 3]


def test_without_matrices_it_is_adamw():
    models = [nn.LayerNorm(4), nn.LayerNorm(4)]
    for model, kind in zip(models, (MuonWithAdamW, torch.optim.AdamW), strict=True):
        optimizer = kind(model.parameters(), lr=1e-2)
        model(torch.arange(8.0).view(2, 4)).square().sum().backward()
        optimizer.step()
    assert torch.equal(models[0].weight, models[1].weight)


def test_a_step_that_is_not_finite_is_skipped():
    model = network()
    optimizer, before = MuonWithAdamW(model.parameters(), lr=1e-2), [p.detach().clone() for p in model.parameters()]
    optimizer.found_inf = torch.ones(())
    assert all(torch.equal(one, other) for one, other in zip(before, train(model, optimizer), strict=True))
    assert not optimizer.state


def test_another_optimizer_cannot_resume(tmp_path):
    run(tmp_path, objective=Regression(), max_train_steps=2, optimizer="muon")
    with pytest.raises(ValueError, match="of another optimizer: it has the moments .*momentum_buffer"):
        run(tmp_path, objective=Regression(), max_train_steps=4, resume_from_checkpoint="latest")
