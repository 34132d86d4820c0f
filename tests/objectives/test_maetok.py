"""MAETok's loss in closed form, its masks, and what each stage trains."""

import math

import pytest
import torch
from factories import tiny_encoder, tiny_maetok
from objective_inputs import batch, numbers, record_calls, trained
from torch import nn
from torch.nn import functional as F

from hf_fae.objectives.maetok import MAETokObjective, falling_mask_ratio, select_patch_mask
from hf_fae.objectives.maetok_targets import FeatureTarget, HOGTarget
from hf_fae.objectives.masking import truncated_normal_mask_ratio


def test_a_share_of_each_image():
    ratios = torch.tensor([0.0, 0.4, 0.6])
    hidden = select_patch_mask(torch.rand(3, 256), ratios).sum(1).tolist()
    assert hidden == [256 - math.ceil(256 * (1 - ratio)) for ratio in (0.0, 0.4, 0.6)]


def test_all_patches_are_equally_likely():
    mask = select_patch_mask(torch.rand(4000, 16), 0.5)
    torch.testing.assert_close(mask.float().mean(0), torch.full((16,), 0.5), atol=0.04, rtol=0)


@pytest.mark.parametrize(("step", "share"), [(0, 0.6), (12_500, 0.45), (25_000, 0.3), (50_000, 0.0), (70_000, 0.0)])
def test_falling_share(step, share):  # maetok spec, section 1
    assert falling_mask_ratio(step, 0.6, 50_000) == pytest.approx(share)


def test_mask_ratio_out_of_range():
    with pytest.raises(ValueError, match=r"mask_ratio must be in \[0, 1\), got -0.1"):
        select_patch_mask(torch.rand(2, 4), -0.1)


class TestMAETokObjective:
    def rich(self, **kwargs):
        model = tiny_maetok(auxiliary_targets={"hog": 27, "dinov2": 32})
        targets = nn.ModuleDict({"hog": HOGTarget(8), "dinov2": FeatureTarget(tiny_encoder())})
        weights = {"hog": 2.0, "dinov2": 0.5}
        return MAETokObjective(model, targets=targets, target_weights=weights, **kwargs).train()

    def test_terms(self):
        objective, inputs = self.rich(), batch()
        calls = record_calls(objective.model)
        losses = objective(inputs, numbers(3))
        (images, mask), _ = calls[0]
        assert mask.shape == (4, 16) and mask.sum(1).unique().numel() == 1 and 6 <= mask[0].sum() <= 9
        output = objective.model(images, mask, predict_targets=True)
        torch.testing.assert_close(losses["reconstruction"], F.mse_loss(output.sample, images))  # [-1, 1], all pixels
        for name, target in objective.targets.items():
            expected = target(output.predictions[name], inputs, (4, 4), mask)
            torch.testing.assert_close(losses[f"auxiliary/{name}"], expected)
        expected = losses["reconstruction"] + 2 * losses["auxiliary/hog"] + 0.5 * losses["auxiliary/dinov2"]
        torch.testing.assert_close(losses["loss"], expected)

    def test_targets_of_all_patches(self):
        objective, inputs = self.rich(masked_targets=False), batch()
        calls = record_calls(objective.model)
        losses = objective(inputs, numbers(3))
        (images, mask), _ = calls[0]
        predictions = objective.model(images, mask, predict_targets=True).predictions
        expected = objective.targets["hog"](predictions["hog"], inputs, (4, 4), None)
        torch.testing.assert_close(losses["auxiliary/hog"], expected)

    def test_stage_1_trains_everything_but_the_teachers(self):
        objective = self.rich()
        assert trained(objective) == {"model.encoder", "model.decoder", "model.auxiliary_decoders"}
        assert not objective.targets["dinov2"].encoder.training

    @pytest.mark.parametrize("scope", ["batch", "image"])
    def test_shares_follow_the_papers_law(self, scope):
        objective = MAETokObjective(tiny_maetok(sample_size=128), mask_scope=scope)
        masks = torch.cat([objective.sample_mask(8, numbers(seed)) for seed in range(40)])  # of 256 patches
        ratios = masks.float().mean(1)
        assert 0.39 < ratios.min() and ratios.max() <= 0.6
        assert ratios.mean().item() == pytest.approx(0.505, abs=0.03)
        per_batch = [part.unique().numel() for part in ratios.split(8)]
        assert max(per_batch) == 1 if scope == "batch" else min(per_batch) > 2
        if scope == "image":
            random = numbers(0)
            random.uniform(8, 256)
            wanted = truncated_normal_mask_ratio(random.uniform(8))
            assert (ratios[:8] - wanted).abs().max() <= 1 / 256

    def test_stage_2_masks_fewer_and_fewer_patches(self):
        model = tiny_maetok()
        objective = MAETokObjective(model, stage=2, mask_steps=50_000).train()
        for step, share in ((0, 0.6), (25_000, 0.3), (50_000, 0.0), (60_000, 0.0)):
            objective.before_step(step)
            assert objective.falling_ratio == pytest.approx(share)
            masked = objective.sample_mask(4, numbers()).sum(1)
            assert (masked == int(16 * share)).all()  # 16 - ceil(16 (1 - share))
        assert trained(objective) == {"model.decoder"}
        assert not model.encoder.training and all(p.grad is None for p in model.encoder.parameters())
        # The smallest share is one of stage 1.
        objective = MAETokObjective(model, stage=2, min_mask_ratio=0.4, max_mask_ratio=0.3)
        assert objective.sample_mask(4, numbers()).sum() == 4 * 4

    def test_no_masks(self):
        objective = MAETokObjective(tiny_maetok(), min_mask_ratio=0.0, max_mask_ratio=0.0)
        assert not objective.sample_mask(4, numbers()).any()
        assert trained(objective) >= {"model.encoder", "model.decoder"}

    def test_in_eval_mode_it_is_the_tokenizers_own_reconstruction(self):
        model, inputs = tiny_maetok(), batch()
        expected = F.mse_loss(model(inputs["pixel_values"]).sample, inputs["pixel_values"])
        torch.testing.assert_close(MAETokObjective(model).eval()(inputs, numbers())["loss"], expected)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"stage": 0}, "stage must be 1 or 2, got 0"),
            ({"min_mask_ratio": 0.7}, r"must rise within \[0, 1\), got 0.7 and 0.6"),
            ({"mask_std": 0.0}, "mask_std must be positive and finite, got 0.0"),
            ({"mask_scope": "patch"}, "mask_scope must be 'batch' or 'image', got 'patch'"),
            ({"mask_steps": 0}, "mask_steps must be at least 1, got 0"),
            ({"targets": nn.ModuleDict({"hog": HOGTarget(8)})}, r"targets must be .* \[\], got \['hog'\]"),
        ],
    )
    def test_bad_input(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            MAETokObjective(tiny_maetok(), **arguments)

    def test_targets_need_masks_and_stage_1(self):
        with pytest.raises(ValueError, match="masked_targets must be False where max_mask_ratio is 0, got True"):
            self.rich(min_mask_ratio=0.0, max_mask_ratio=0.0)
        with pytest.raises(ValueError, match="targets must be none in stage 2, got .*'dinov2', 'hog'"):
            self.rich(stage=2)
