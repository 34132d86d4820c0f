"""MeanFlow against what its reference code computes, closed forms and finite differences."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from factories import tiny_dit_dh, tiny_fae, tiny_lightning_dit, tiny_mmdit, tiny_raev2_dit
from objective_inputs import batch, numbers, trained
from torch import nn

from hf_fae.objectives.mean_flow import MeanFlowObjective, TimePairs, adaptive_loss, guided_velocity


class Formula(nn.Module):
    """A network that is a formula of x_t (B, 3, 2, 2), r and t in [0, 1] and the labels, and a trained bias."""

    def __init__(self, formula, num_classes=3):
        super().__init__()
        self.config = SimpleNamespace(use_meanflow=True, num_classes=num_classes, prediction_type="velocity")
        self.formula, self.bias = formula, nn.Parameter(torch.zeros(()))

    def forward(self, hidden_states, timestep, class_labels, timestep_r=None):
        t = timestep.view(-1, 1, 1, 1) / 1000
        r = t if timestep_r is None else timestep_r.view(-1, 1, 1, 1) / 1000
        return SimpleNamespace(sample=self.formula(hidden_states, r, t, class_labels) + self.bias)


class Numbers:
    """Random numbers of all images at once: their own generators would take minutes."""

    def normal(self, *shape):
        return torch.randn(shape)

    def uniform(self, *shape):
        return torch.rand(shape)


def objective(model, **kwargs):
    return MeanFlowObjective(model, nn.Identity(), **kwargs)


@pytest.fixture(scope="module")
def values(oracle):
    with np.load(oracle("meanflow") / "meanflow.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    shape = (-1, 1, 1, 1)
    arrays["noisy"] = torch.lerp(arrays["x"], arrays["eps"], arrays["t"].view(shape))
    arrays["velocity"] = arrays["eps"] - arrays["x"]
    return arrays


def network(values, kind):
    def formula(x, r, t, labels):
        out = x.flatten(1) @ values["A"].T + r.flatten(1) * values["b"] + t.flatten(1) * values["c"]
        if kind == "labels":
            out = out + values["label_table"][labels]
        return (out if kind == "linear" else out.tanh()).view_as(x)

    return Formula(formula)


@pytest.mark.parametrize("kind", ["linear", "tanh"])
class TestTarget:
    def test_target(self, kind, values):
        condition = {"class_labels": values["labels"]}
        target, _ = objective(network(values, kind)).target(
            values["velocity"], values["noisy"], values["t"], values["r"], condition
        )
        torch.testing.assert_close(target, values[f"{kind}_target"], atol=1e-5, rtol=1e-5)
        assert torch.equal(target[3], values["velocity"][3])  # r = t

    def test_loss_and_its_gradient(self, kind, values):
        model, target = network(values, kind), values[f"{kind}_target"]
        average = objective(model).average(values["noisy"], values["t"], values["r"], {"class_labels": None})
        for power, constant, name in ((1, 1e-2, "p1_c1e-2"), (0.75, 1e-3, "p0.75_c1e-3")):
            losses, errors = adaptive_loss(average, target, power, constant)
            torch.testing.assert_close(losses, values[f"{kind}_loss_{name}"], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(errors, values[f"{kind}_loss_raw"], atol=1e-4, rtol=1e-5)
        losses.mean().backward()  # our bias is one for all channels
        gradient = values[f"{kind}_batch_grad_bias_p0.75_c1e-3"].sum()
        torch.testing.assert_close(model.bias.grad, gradient, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(losses.mean(), values[f"{kind}_batch_loss_p0.75_c1e-3"])


@pytest.mark.parametrize("name", ["cfgA", "cfgB", "cfgC", "cfgD"])
def test_guidance(name, values):
    omega, kappa, low, high = values[f"{name}_settings"].tolist()
    settings = {"omega": omega, "kappa": kappa, "guidance_interval": (low, high)}
    trainer = objective(network(values, "labels"), **settings)
    inputs = values["noisy"], values["t"]
    conditions = ({"class_labels": labels} for labels in (values["labels"], torch.full((5,), 3)))
    guided = trainer.guide(values["velocity"], *inputs, *conditions)
    used = values[f"{name}_labels_used"]
    dropped = (used == 3).view(-1, 1, 1, 1)
    guided = torch.where(dropped, values["velocity"], guided)
    torch.testing.assert_close(guided, values[f"{name}_v_guided"], atol=1e-5, rtol=1e-5)
    condition = {"class_labels": used}
    target, _ = trainer.target(guided, *inputs, values["r"], condition)
    torch.testing.assert_close(target, values[f"{name}_target"], atol=2e-5, rtol=1e-5)
    average = trainer.average(*inputs, values["r"], condition)
    losses, errors = adaptive_loss(average, target)
    torch.testing.assert_close(errors, values[f"{name}_loss_raw"], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(losses.mean(), values[f"{name}_batch_loss_p1_c1e-2"], atol=1e-6, rtol=1e-5)


def test_guidance_of_improved_mean_flow(values):
    """Its target is ours with omega = 1 and kappa = 1 - 1 / w, and its loss is that of MeanFlow along v_tangent."""
    scale, shape = values["imf_omega"], (-1, 1)

    def velocity(scale, low, high, labels):
        parts = (1 - 1 / scale) * values["imf_E"] + low * values["imf_Q"] + high * values["imf_S"]
        parts = parts + values["label_table"][labels] + values["t"].view(shape) * values["c"]
        return (values["noisy"].flatten(1) @ values["imf_Av"].T + parts).tanh().view_as(values["noisy"])

    ones, labels = torch.ones(5, 1), values["labels"]
    inside = (values["t"] >= values["imf_t_min"]) & (values["t"] <= values["imf_t_max"])
    is_instant = values["r"] == values["t"]
    scale = torch.where(inside | is_instant, scale, 1.0).view(shape)
    conditional = velocity(scale, 0, ones, labels)
    unconditional = velocity(ones, 0, ones, torch.full((5,), 3))
    kappa = (1 - 1 / scale)[..., None, None]
    guided = guided_velocity(values["velocity"], conditional, unconditional, values["t"], 1.0, kappa)
    torch.testing.assert_close(guided, values["imf_v_guided"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(conditional, values["imf_v_tangent"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "velocity"), [("mft", "data"), ("mfd", "teacher")])
def test_distillation(name, velocity, values, oracle):
    """The exact derivative, where MF-RAE's code takes finite differences."""
    with np.load(oracle("meanflow") / "mfrae.npz") as file:
        mfrae = {key: torch.from_numpy(file[key]).float() for key in file.files}
    t, r = mfrae["t_used"], mfrae["r"]
    noisy = torch.lerp(values["x"], values["eps"], t.view(-1, 1, 1, 1))

    def teach(x, r, t, labels):
        out = 0.5 * (x.flatten(1) @ values["A"].T) - t.flatten(1) * values["c"] + values["label_table"][labels]
        return out.tanh().view_as(x)

    teacher = Formula(teach) if velocity == "teacher" else None
    trainer = objective(network(values, "labels"), teacher=teacher)
    condition = {"class_labels": values["labels"]}
    v = trainer.velocity(values["x"], values["eps"], noisy, t, condition)
    target, _ = trainer.target(v, noisy, t, r, condition)
    torch.testing.assert_close(target, mfrae[f"{name}_target_exact_jvp"], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(target, mfrae[f"{name}_target"], atol=1e-4, rtol=1e-4)


class TestTimes:
    @pytest.mark.parametrize(
        ("times", "expected"),
        [
            (TimePairs(), (0.534, 0.179, 0.476, 0.749)),
            (TimePairs(-2.0, 2.0, instant_share=0.25), (0.353, 0.270, 0.161, 0.251)),
            (TimePairs(-0.6, 1.6, instant_share=0.25, mean_r=-4.0), (0.398, 0.273, 0.130, 0.299)),
            (TimePairs(timestep_sampling="uniform", shift=48**-0.5), (0.9026, 0.1162, 0.8445, 0.749)),
        ],
        ids=["ImageNet", "CIFAR-10", "CIFAR-10, later", "MF-RAE"],
    )
    def test_statistics(self, times, expected):  # few_steps spec, rows 7 to 10

        torch.manual_seed(0)
        t, r = times.sample(400_000, Numbers())
        assert (r <= t).all() and r.min() >= 0 and t.max() <= 1
        found = t.mean(), t.std(), r.mean(), (r == t).float().mean()
        assert [number.item() for number in found] == pytest.approx(expected, abs=0.003)

    def test_bad_numbers(self):
        with pytest.raises(ValueError, match="instant_share must be from 0 to 1, got 1.5"):
            TimePairs(instant_share=1.5)
        with pytest.raises(
            ValueError, match=r"shift must be in \(0, 1\], the papers' s and not diffusers' 1 / s, got 2"
        ):
            TimePairs(shift=2.0)
        with pytest.raises(ValueError, match="std must be finite and not negative, got -1"):
            TimePairs(std=-1.0)
        with pytest.raises(ValueError, match="timestep_sampling must be 'uniform' or 'logit_normal', got 'cosine'"):
            TimePairs(timestep_sampling="cosine")


class TestClosedForms:
    """Rows 14 to 16: the flows of Gaussian data and of data at one point."""

    @staticmethod
    def gaussian(x, r, t, labels):
        def s(t):
            return ((1 - t).square() + t.square()).sqrt()

        instant = x * (2 * t - 1) / s(t).square()
        interval = torch.where(t > r, t - r, 1.0)
        return torch.where(t > r, x * (s(t) - s(r)) / (s(t) * interval), instant)

    def test_the_average_velocity_is_its_own_target(self):
        trainer, x = objective(Formula(self.gaussian)), torch.randn(64, 3, 2, 2)
        t, r = torch.rand(2, 64).sort(dim=0, descending=True).values
        condition = {"class_labels": torch.zeros(64, dtype=torch.long)}
        velocity = trainer.average(x, t, t, condition)
        target, derivative = trainer.target(velocity, x, t, r, condition)
        torch.testing.assert_close(target, trainer.average(x, t, r, condition), atol=2e-5, rtol=1e-4)
        assert derivative.abs().max() > 0.1

    def test_values_and_paths(self):
        u, x = objective(Formula(self.gaussian)), torch.full((1, 3, 2, 2), 2.0)

        def average(x, r, t):
            return u.average(x, torch.tensor([t]), torch.tensor([r]), {"class_labels": torch.zeros(1)})

        for r, t, factor in ((0.0, 1.0, 0.0), (0.0, 0.5, -0.828427), (1.0, 1.0, 1.0), (0.0, 0.0, -1.0)):
            torch.testing.assert_close(average(x, r, t), factor * x, atol=1e-5, rtol=0)
        for path in ([1.0, 0.0], [1.0, 0.5, 0.0], [1.0, 0.9, 0.3, 0.1, 0.0]):
            sample = x
            for t, r in zip(path, path[1:], strict=False):
                sample = sample - (t - r) * average(sample, r, t)
            torch.testing.assert_close(sample, x, atol=1e-5, rtol=0)

    def test_data_at_one_point(self):
        trainer = objective(Formula(lambda x, r, t, labels: x / t))
        x, t = torch.randn(8, 3, 2, 2), torch.rand(8) * 0.9 + 0.1
        condition = {"class_labels": torch.zeros(8, dtype=torch.long)}
        target, derivative = trainer.target(x / t.view(-1, 1, 1, 1), x, t, t / 2, condition)
        torch.testing.assert_close(derivative, torch.zeros_like(x), atol=1e-3, rtol=0)
        torch.testing.assert_close(x - t.view(-1, 1, 1, 1) * target, torch.zeros_like(x), atol=1e-3, rtol=0)

    def test_adaptive_weight(self):
        prediction = torch.zeros(1, 1, 1, 1)
        target = prediction + 67.18128**0.5
        for power, constant, expected in ((1.0, 1e-2, 0.999851), (0.75, 1e-3, 2.862907)):  # row 6
            assert adaptive_loss(prediction, target, power, constant)[0].item() == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize(("omega", "kappa", "scale"), [(1.0, 0.5, 2.0), (0.2, 0.92, 2.5), (3.0, 0.0, 3.0)])
    def test_scale_at_the_fixed_point(self, omega, kappa, scale):  # row 12
        velocity, unconditional, t = torch.tensor(2.0).view(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.ones(1)
        guided = velocity
        for _ in range(300):
            guided = guided_velocity(velocity, guided, unconditional, t, omega, kappa)
        assert guided.item() == pytest.approx(1 + scale, rel=1e-4)


class Scale(nn.Module):
    """u = x g(t, r), whose g is learned: what the average velocity of Gaussian data is."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(use_meanflow=True, num_classes=1, prediction_type="velocity")
        self.net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, hidden_states, timestep, class_labels, timestep_r):
        scale = self.net(torch.stack([timestep, timestep_r], dim=-1) / 1000)
        return SimpleNamespace(sample=hidden_states * scale.view(-1, 1, 1, 1))


@pytest.mark.slow
def test_a_short_training_finds_the_average_velocity():
    """From the exact velocity; the capacity of the network limits the error, 0.006 on average."""
    torch.manual_seed(0)
    teacher, model = Formula(TestClosedForms.gaussian), Scale()
    times = TimePairs(timestep_sampling="uniform", instant_share=0.5)
    trainer = objective(model, times=times, teacher=teacher, adaptive_power=0.0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000)
    condition = {"class_labels": torch.zeros(256, dtype=torch.long)}
    for _ in range(2000):
        latents, noise = torch.randn(2, 256, 4, 1, 1)
        t, r = times.sample(256, Numbers())
        noisy = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
        target, _ = trainer.target(trainer.velocity(latents, noise, noisy, t, condition), noisy, t, r, condition)
        (trainer.average(noisy, t, r, condition) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    t, r = torch.rand(2, 4096).sort(dim=0, descending=True).values
    ones, condition = torch.ones(4096, 1, 1, 1), {"class_labels": torch.zeros(4096, dtype=torch.long)}
    with torch.no_grad():
        error = trainer.average(ones, t, r, condition) - TestClosedForms.gaussian(
            ones, r.view(-1, 1, 1, 1), t.view(-1, 1, 1, 1), None
        )
        assert error.abs().mean() < 0.015
        noise = torch.randn(4096, 2, 1, 1)
        samples = noise - trainer.average(noise, torch.ones(4096), torch.zeros(4096), condition)
    assert samples.mean().abs() < 0.05
    torch.testing.assert_close(samples.flatten(1).T.cov(), torch.eye(2), atol=0.1, rtol=0)


@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
@pytest.mark.parametrize("make", [tiny_lightning_dit, tiny_dit_dh, tiny_raev2_dit, tiny_mmdit])
def test_the_derivative_is_that_of_finite_differences(make, prediction_type):
    model = make(use_meanflow=True, base_head_layer=None, prediction_type=prediction_type)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.03)
    conditions = {"class_labels": torch.tensor([0, 1, 2])}
    if make is tiny_mmdit:
        conditions = {"encoder_hidden_states": torch.randn(3, 5, 24)}
    trainer = objective(model, condition=nn.Identity())
    x, v, t, r = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4), torch.tensor([0.9, 0.5, 0.7]), torch.zeros(3)
    with torch.no_grad():
        exact, step = trainer.derivative(x, t, r, v, conditions), 1e-3
        ends = (trainer.average(x + sign * step * v, t + sign * step, r, conditions) for sign in (1, -1))
        error = exact - next(ends).sub(next(ends)) / (2 * step)
        assert error.abs().max() < 2e-3 * exact.abs().max().clamp_min(1)


class TestTraining:
    def make(self, **kwargs):
        return MeanFlowObjective(tiny_lightning_dit(use_meanflow=True), tiny_fae(), **kwargs)

    def test_all_of_the_model_is_trained(self):
        names = trained(self.make(times=TimePairs(instant_share=0.5), omega=2.0))
        assert "model.interval_embedding" in names and "model.blocks" in names

    @pytest.mark.parametrize("improved", [False, True])
    def test_without_intervals_it_is_flow_matching_to_the_bit(self, improved):
        """Up to the sum over numbers, 64 of them, for which flow matching has the mean."""
        trainer = self.make(times=TimePairs(instant_share=1.0), adaptive_power=0.0, improved=improved)
        examples, random = batch(), numbers()
        losses = trainer.eval()(examples, numbers())
        latents = trainer.latents(examples, random)
        t, _ = trainer.times.sample(4, random)
        noise = random.normal(*latents.shape)
        noisy = torch.lerp(latents, noise, t.view(-1, 1, 1, 1))
        velocity = trainer.model(noisy, 1000 * t, class_labels=examples["class_labels"]).sample
        expected = (velocity - (noise - latents)).square().mean(dim=(1, 2, 3)).mean()
        assert latents[0].numel() == 64 and torch.equal(losses["loss"] / 64, expected)
        assert losses["mse_interval"].count == 0

    def test_the_own_velocity_changes_the_derivative_alone(self):
        plain, improved = (self.make(times=TimePairs(instant_share=0.0), improved=own).eval() for own in (False, True))
        improved.model.load_state_dict(plain.model.state_dict())
        with torch.no_grad():
            for trainer in (plain, improved):
                torch.manual_seed(0)
                for parameter in trainer.model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        examples = batch()
        one, other = (trainer(examples, numbers()) for trainer in (plain, improved))
        assert one["derivative_square"] != other["derivative_square"]
        assert one["mse_interval"].count == other["mse_interval"].count == 4

    def test_bad_arguments(self):
        model, vae = tiny_lightning_dit(use_meanflow=True), tiny_fae()
        for kwargs, message in (
            ({"kappa": 1.0}, "kappa must be below 1, got 1.0"),
            ({"omega": -1.0}, "omega must be finite and not negative, got -1.0"),
            ({"guidance_interval": (0.5, 0.5)}, "guidance_interval must be rising within"),
            ({"improved": True, "teacher": tiny_lightning_dit()}, "improved must be False with a teacher"),
        ):
            with pytest.raises(ValueError, match=message):
                MeanFlowObjective(model, vae, **kwargs)
        with pytest.raises(ValueError, match="model must have use_meanflow"):
            MeanFlowObjective(tiny_lightning_dit(), vae)
