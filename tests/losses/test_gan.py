"""The adversarial term: closed forms, the two networks' gradients apart, and many processes against one."""

from pathlib import Path

import pytest
import torch
from gan_inputs import gradients, images, tiny_discriminator
from torch import distributed, nn

from hf_fae.losses.diffaugment import DiffAugment
from hf_fae.losses.discriminators import NLayerDiscriminator, PatchDiscriminator
from hf_fae.losses.gan import (
    AdversarialLoss,
    LeCam,
    adaptive_weight,
    adversarial_hinge_loss,
    discriminator_hinge_loss,
)
from hf_fae.utils.randomness import ImageRandom


@pytest.fixture(params=["patch", "token"])
def discriminator(request):
    return tiny_discriminator(request.param)


class Painter(nn.Module):
    """A tiny generator and its loss against a discriminator, as an objective has them."""

    def __init__(self, adversarial):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 1))
        self.adversarial = adversarial

    def forward(self, inputs, targets, step, random):
        fakes = self.layers(inputs)
        reconstruction = (fakes - targets).abs().mean()
        last = self.layers[2].weight
        self.adversarial.before_step(step)
        losses = self.adversarial(fakes, targets, reconstruction, last, random)
        return {**losses, "fakes": fakes, "loss": reconstruction + losses["loss"]}


class TestLosses:
    def test_hinge_at_zero_logits_is_one(self):
        assert discriminator_hinge_loss(torch.zeros(3, 7), torch.zeros(3, 7)) == 1.0

    def test_hinge(self):
        real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, -0.5, 1.0])
        # real: 0 and 0.5; fake: 0, 0.5 and 2
        torch.testing.assert_close(discriminator_hinge_loss(real, fake), torch.tensor((0.25 + 2.5 / 3) / 2))
        torch.testing.assert_close(adversarial_hinge_loss(fake), torch.tensor(2.5 / 3))

    def test_adaptive_weight(self):
        weight = torch.ones(2, 2, requires_grad=True)
        # gradients: 3 in one element, 0.5 in all four
        value = adaptive_weight(3 * weight[0, 0], weight.sum() / 2, weight)
        torch.testing.assert_close(value, torch.tensor(3 / (1 + 1e-6)))
        assert not value.requires_grad and weight.grad is None

    def test_adaptive_weight_is_clamped(self):
        weight = torch.ones(1, requires_grad=True)
        assert adaptive_weight(3 * weight.sum(), 0 * weight.sum(), weight) == 1e4

    def test_lecam(self):
        lecam = LeCam(decay=0.9)
        real, fake = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([-4.0, 1.0], requires_grad=True)
        first = lecam(real, fake)  # averages are 0, means 2 and -1.5
        torch.testing.assert_close(first, torch.tensor(2.0**2 + 1.5**2))
        first.backward()
        torch.testing.assert_close(real.grad, torch.tensor([2.0, 2.0]))  # 2 * 2 of the mean, halved
        torch.testing.assert_close(fake.grad, torch.tensor([-1.5, -1.5]))
        second = lecam(real.detach(), fake.detach())  # averages are 0.2 and -0.15
        torch.testing.assert_close(second, torch.tensor(2.15**2 + 1.7**2))
        torch.testing.assert_close(lecam.real_mean, torch.tensor(0.9 * 0.2 + 0.1 * 2))
        torch.testing.assert_close(lecam.fake_mean, torch.tensor(0.9 * -0.15 + 0.1 * -1.5))
        lecam.eval()(real, fake)
        torch.testing.assert_close(lecam.real_mean, torch.tensor(0.38))

    def test_lecam_is_one_sided(self):
        assert LeCam()(torch.tensor([-1.0]), torch.tensor([2.0])) == 0


def test_eps_of_the_adaptive_weight():
    weight = torch.ones(2, requires_grad=True)
    loss, game = 3e-4 * weight.sum(), 1e-4 * weight[0]
    assert adaptive_weight(loss, game, weight, eps=1e-4).item() == pytest.approx(3e-4 * 2**0.5 / 2e-4, rel=1e-4)


class TestAdversarialLoss:
    def test_one_backward_equals_two(self, discriminator):
        """The usual scheme: the generator's step with the discriminator frozen, then the discriminator's step."""
        painter = Painter(AdversarialLoss(discriminator, weight=0.7, adaptive=True, lecam_weight=0.3)).eval()
        inputs, targets = images(), images()
        losses = painter(inputs, targets, 0, ImageRandom(0, 0))
        losses["loss"].backward()
        found = gradients(painter)
        painter.zero_grad()

        fakes = painter.layers(inputs)
        reconstruction, last = (fakes - targets).abs().mean(), painter.layers[2].weight
        generator = -discriminator(fakes).mean()
        norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, generator)]
        ratio = norms[0] / (norms[1] + 1e-6)
        (reconstruction + 0.7 * ratio * generator).backward()
        expected = gradients(painter.layers)
        painter.zero_grad()
        rounded = (fakes.detach().clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
        real, fake = discriminator(targets), discriminator(rounded)
        loss = ((1 - real).relu().mean() + (1 + fake).relu().mean()) / 2
        (loss + 0.3 * (real.mean().relu() ** 2 + (-fake.mean()).relu() ** 2)).backward()

        torch.testing.assert_close(losses["adaptive_weight"], ratio, rtol=1e-4, atol=0)
        assert found.keys() == {f"layers.{name}" for name in expected} | {
            f"adversarial.discriminator.{name}" for name in gradients(discriminator)
        }
        for name, gradient in expected.items():
            torch.testing.assert_close(found[f"layers.{name}"], gradient, rtol=1e-4, atol=1e-6)
        for name, gradient in gradients(discriminator).items():
            torch.testing.assert_close(found[f"adversarial.discriminator.{name}"], gradient, rtol=1e-4, atol=1e-6)

    def test_the_generators_term_leaves_the_discriminator_alone(self, discriminator):
        adversarial = AdversarialLoss(discriminator)
        x = images().requires_grad_()
        adversarial_hinge_loss(adversarial._judge_as_constant(x, ImageRandom(0, 0))).backward()
        assert x.grad.abs().sum() > 0 and not gradients(discriminator)

    def test_the_discriminators_term_leaves_the_generator_alone(self, discriminator):
        adversarial = AdversarialLoss(discriminator, lecam_weight=0.1, adversarial_start=1)
        x = images().requires_grad_()
        adversarial(x, images(), x.mean(), x, ImageRandom(0, 0))["loss"].backward()
        assert x.grad is None and gradients(discriminator)

    def test_starts(self, discriminator):
        adversarial = AdversarialLoss(discriminator, lecam_weight=0.1, discriminator_start=3, adversarial_start=5)
        painter = Painter(adversarial)
        keys = {
            2: set(),
            3: {"discriminator", "lecam", "logits_real", "logits_fake"},
            5: {"discriminator", "lecam", "logits_real", "logits_fake", "decoder"},
        }
        inputs, targets, state = images(), images(), discriminator.state_dict()
        state = {name: value.clone() for name, value in state.items()}
        for step, expected in keys.items():
            painter.zero_grad()
            losses = painter(inputs, targets, step, ImageRandom(0, 0))
            assert set(losses) == expected | {"loss", "fakes"}
            losses["loss"].backward()
            assert bool(gradients(discriminator)) == (step >= 3)
            assert not any(value.requires_grad for name, value in losses.items() if name not in ("loss", "fakes"))
            if step == 2:
                reconstruction = (losses["fakes"] - targets).abs().mean()
                assert losses["loss"] == reconstruction
                assert all(torch.equal(value, state[name]) for name, value in discriminator.state_dict().items())
            if step == 3:
                before = gradients(painter.layers)
            if step == 5:
                after = gradients(painter.layers)
        assert any(not torch.equal(before[name], after[name]) for name in before)

    def test_a_step_that_is_not_finite_does_not_live_on(self):
        adversarial = AdversarialLoss(PatchDiscriminator(32, 1), lecam_weight=0.1).train()
        for scale, finite in ((1.0, True), (float("nan"), False), (1.0, True)):
            x = scale * images()
            loss = adversarial(x, images(), x.mean(), x, ImageRandom(0, 0))["loss"]
            assert torch.isfinite(loss).item() == finite

    def test_the_game(self):
        """Real images are striped: the discriminator finds out, and a generator that has it alone paints stripes."""
        adversarial = AdversarialLoss(PatchDiscriminator(32, 1), weight=1.0, augment=DiffAugment(translation=0))
        stripes = torch.tensor([0.6, -0.6]).repeat(8).expand(4, 3, 16, 16)
        fakes = nn.Parameter(0.1 * torch.randn(4, 3, 16, 16))
        optimizer = torch.optim.Adam([{"params": [fakes], "lr": 0.02}, {"params": adversarial.parameters()}], lr=1e-3)
        logits = []
        for step in range(40):
            optimizer.zero_grad()
            losses = adversarial(fakes, stripes, fakes.mean(), fakes, ImageRandom(0, 4 * step))
            losses["loss"].backward()
            optimizer.step()
            logits.append(losses["logits_real"] - losses["logits_fake"])
        assert max(logits) > 1 > logits[0].abs()
        assert (fakes.detach() * stripes).mean() > 0.05

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"weight": -1.0}, "weight must not be negative, got -1.0"),
            ({"lecam_weight": -0.1}, "lecam_weight must not be negative, got -0.1"),
            (
                {"discriminator_start": 5, "adversarial_start": 2},
                "adversarial_start must not be before discriminator_start, got 2 and 5",
            ),
        ],
    )
    def test_bad_input(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            AdversarialLoss(nn.Identity(), **kwargs)

    def test_batch_statistics_of_real_images_and_reconstructions_stay_apart(self):
        """Or the statistics of a batch would reveal its other half."""
        discriminator, calls = NLayerDiscriminator(8), []
        game = AdversarialLoss(discriminator).train()
        fakes, reals = images().requires_grad_(), images()
        discriminator.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
        losses = game(fakes, reals, fakes.mean(), fakes, ImageRandom(0, 0))
        assert calls == [4, 4, 4]
        rounded = ((fakes.detach() + 1) * 127.5).round() / 127.5 - 1
        expected = discriminator_hinge_loss(discriminator(reals), discriminator(rounded))
        torch.testing.assert_close(losses["discriminator"], expected)


def test_consistency_is_the_difference_that_holes_make():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(3.0))
            self.seen = []

        def forward(self, pictures):
            self.seen.append(pictures.detach())
            return self.factor * pictures.mean((1, 2, 3))

    discriminator = Mean()
    game = AdversarialLoss(discriminator, consistency_weight=4.0).train()
    fakes, reals = images(), images()
    without = AdversarialLoss(Mean())(fakes, reals, fakes.mean(), fakes, ImageRandom(0, 0))
    losses = game(fakes, reals, fakes.mean(), fakes, ImageRandom(0, 0))
    plain, holes = discriminator.seen[1].chunk(2)  # one call, for the same spectral norms
    assert len(discriminator.seen) == 2
    assert (holes == 0).float().mean() > 0.05 and not (plain == 0).all(1).any(1).any()
    expected = (3 * (plain - holes).mean((1, 2, 3))).square().mean()
    torch.testing.assert_close(losses["consistency"], expected)
    torch.testing.assert_close(losses["loss"], without["loss"] + 4 * expected)
    with pytest.raises(ValueError, match="consistency_weight must not be negative, got -1"):
        AdversarialLoss(Mean(), consistency_weight=-1)


def play(kind, rank=0, world_size=1):
    """Three steps of four images on `world_size` processes: the state and the last gradients, averaged over them."""
    torch.manual_seed(0)
    loss = AdversarialLoss(
        tiny_discriminator(kind),
        weight=0.75,
        adaptive=True,
        lecam_weight=0.1,
        augment=DiffAugment(cutout=0.2),
        adversarial_start=1,
    )
    painter = Painter(loss).train()
    inputs, targets = images(12), images(12)
    run = painter if world_size == 1 else nn.parallel.DistributedDataParallel(painter, broadcast_buffers=False)
    share = 4 // world_size
    for step in range(3):
        first = 4 * step + share * rank
        part = slice(first, first + share)
        painter.zero_grad()
        run(inputs[part], targets[part], step, ImageRandom(7, first))["loss"].backward()
        with torch.no_grad():
            for parameter in painter.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
    return {"state": painter.state_dict(), "gradients": gradients(painter)}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, processes):
    """What each of two processes has after `play`, by discriminator."""
    folder = tmp_path_factory.mktemp("processes")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_gan; test_gan.play_as_process"
    processes.run_in_two_processes(["-c", f"{code}({str(folder)!r})"])
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("kind", ["patch", "token"])
def test_two_processes_equal_one_with_the_doubled_batch(two_processes, kind):
    expected, results = play(kind), [result[kind] for result in two_processes]
    for part in ("state", "gradients"):
        for name, value in results[0][part].items():
            assert torch.equal(value, results[1][part][name]), name
            torch.testing.assert_close(value, expected[part][name], rtol=1e-5, atol=1e-5)
    assert expected["state"]["adversarial.lecam.real_mean"] != 0


def play_as_process(folder):
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.save({kind: play(kind, rank, 2) for kind in ("patch", "token")}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
