import json

import pytest
import torch
from factories import tiny_fae
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from training_runs import (
    ImageNoise,
    Regression,
    Stopped,
    Vectors,
    assert_equal_checkpoints,
    checkpoints,
    read_log,
    run,
)

from hf_fae.data.images import DataArguments, ImageData
from hf_fae.objectives.fae import FeatureObjective


class TestResume:
    # A kill in step 6 (after checkpoint 4) and, on the way again, in step 10 (after checkpoint 8).
    @pytest.mark.parametrize(("mixed_precision", "optimizer"), [("no", "adamw"), ("bf16", "adamw"), ("no", "muon")])
    def test_killed_twice_equals_never_killed_to_the_bit(self, tmp_path, mixed_precision, optimizer):
        kwargs = {
            "optimizer": optimizer,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 2,
            "gradient_accumulation_steps": 2,
            "mixed_precision": mixed_precision,
            "resume_from_checkpoint": "latest",
        }

        def validate_with(objectives):
            return lambda step: {"norm": objectives[-1].model[0].weight.norm().item()}

        whole = Regression()
        initial = {name: value.clone() for name, value in whole.state_dict().items()}
        run(tmp_path / "whole", objective=whole, validate=validate_with([whole]), **kwargs)
        for images in (5 * 8 + 4, 9 * 8):
            killed = Regression()
            if images < 64:
                killed.load_state_dict(initial)
            with pytest.raises(Stopped):
                run(tmp_path / "killed", Vectors(images), killed, validate_with([killed]), **kwargs)
        last = Regression()  # of other initial values: all must come from the checkpoint
        run(tmp_path / "killed", objective=last, validate=validate_with([last]), **kwargs)

        for name, value in whole.state_dict().items():
            assert torch.equal(value, last.state_dict()[name]), name
        assert_equal_checkpoints(*(tmp_path / kind / "checkpoint-12" for kind in ("whole", "killed")))
        assert read_log(tmp_path / "whole") == read_log(tmp_path / "killed")

    def test_longer_training_goes_on(self, tmp_path):
        objective, first, again = Regression(), Regression(), Regression()
        first.load_state_dict(objective.state_dict())
        run(tmp_path / "a", objective=objective, max_train_steps=12)
        run(tmp_path / "b", objective=first, max_train_steps=6)
        loop, _, _ = run(tmp_path / "b", objective=again, max_train_steps=12, resume_from_checkpoint="latest")
        assert (loop.step, loop.images_seen) == (12, 48)
        assert all(torch.equal(a, b) for a, b in zip(objective.parameters(), again.parameters(), strict=True))

    def test_finished_run_only_validates_and_saves(self, tmp_path):
        called = []

        def validate(step):
            called.append(step)
            return {"score": 1.0}

        run(tmp_path, validate=validate)
        log = (tmp_path / "log.jsonl").read_text()
        called.clear()
        for _ in range(2):
            run(tmp_path, validate=validate, save=lambda: called.append("save"), resume_from_checkpoint="latest")
        assert called == [12, "save"] * 2
        assert (tmp_path / "log.jsonl").read_text() == log

    def test_going_back_leaves_the_other_way_behind(self, tmp_path):
        run(tmp_path)
        flags = {"resume_from_checkpoint": str(tmp_path / "checkpoint-4"), "checkpoints_total_limit": 2}
        with pytest.raises(Stopped):
            run(tmp_path, Vectors(kill_after=9 * 4), **flags)
        assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-8"]
        assert read_log(tmp_path)[-1]["step"] == 9

    def test_latest_without_checkpoints_starts_a_new_log(self, tmp_path):
        (tmp_path / "log.jsonl").write_text('{"step": 3, "loss": 1.0}\n{"step": 6, "lo')  # killed before checkpoint 1
        assert run(tmp_path, resume_from_checkpoint="latest")[0].step == 12
        assert [line["step"] for line in read_log(tmp_path)] == [3, 4, 6, 8, 9, 12]

    def test_run_that_would_overwrite_another_is_refused(self, tmp_path):
        run(tmp_path)
        with pytest.raises(ValueError, match="holds checkpoint-12: pass resume_from_checkpoint='latest'"):
            run(tmp_path)

    def test_data_in_another_order_are_refused_before_anything_changes(self, tmp_path, image_folder):
        def data(rows):
            return ImageData(DataArguments(str(image_folder), resolution=32, max_train_samples=rows))

        def state():
            return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

        run(tmp_path, data(32), FeatureObjective(tiny_fae()), max_train_steps=2)
        before = state()
        flags = {"resume_from_checkpoint": "latest", "max_train_steps": 4}
        with pytest.raises(ValueError, match="in the order of .*checkpoint-2.*rows was 32 and is 31"):
            run(tmp_path, data(31), FeatureObjective(tiny_fae()), **flags)
        assert state() == before
        run(tmp_path, data(32), FeatureObjective(tiny_fae()), **flags)

    def test_wrong_checkpoint_path(self, tmp_path):
        with pytest.raises(ValueError, match="no-such-place' is not a checkpoint folder"):
            run(tmp_path, resume_from_checkpoint=str(tmp_path / "no-such-place"))

    def test_checkpoint_of_another_model(self, tmp_path):
        run(tmp_path)
        other = Regression()
        other.model = nn.Linear(8, 8)
        with pytest.raises(ValueError, match="does not fit the objective"):
            run(tmp_path, objective=other, resume_from_checkpoint="latest")


class TestCheckpoints:
    def test_limit_and_leftovers(self, tmp_path):
        (tmp_path / ".checkpoint-4").mkdir()  # of a killed run
        run(tmp_path, checkpoints_total_limit=2)
        assert checkpoints(tmp_path) == ["checkpoint-12", "checkpoint-8"]
        assert not list(tmp_path.glob(".checkpoint-*"))

    def test_killed_while_writing_leaves_no_checkpoint(self, tmp_path, monkeypatch):
        def killed(*args):
            raise Stopped

        monkeypatch.setattr("hf_fae.training.checkpoints.commit_checkpoint", killed)
        with pytest.raises(Stopped):
            run(tmp_path)
        assert checkpoints(tmp_path) == []

    def test_what_is_in_one(self, tmp_path):
        _, objective, _ = run(tmp_path)
        folder = tmp_path / "checkpoint-12"
        trained = {f"model.{name}" for name in objective.model.state_dict()}
        assert set(load_file(folder / "model.safetensors")) == {*trained, "offset"}  # nothing that is frozen
        assert set(load_file(folder / "ema.safetensors")) == trained
        assert json.loads((folder / "state.json").read_text())["images_seen"] == 48
        moments = ("exp_avg", "exp_avg_sq", "step")
        assert set(load_file(folder / "optimizer.safetensors")) == {f"{p}.{m}" for p in trained for m in moments}
        assert sorted(path.name for path in folder.iterdir()) == [
            "checksums.json",
            "ema.safetensors",
            "model.safetensors",
            "optimizer.safetensors",
            "state.json",
        ]


class TestNumerics:
    def test_loss_of_a_real_objective_falls(self, tmp_path, image_folder):
        data = ImageData(DataArguments(dataset_name=str(image_folder), resolution=32))
        objective = FeatureObjective(tiny_fae())
        run(tmp_path, data, objective, max_train_steps=40, train_batch_size=8, mixed_precision="bf16", logging_steps=5)
        log = read_log(tmp_path)
        losses = [line["loss"] for line in log]
        assert losses[-1] < 0.6 * losses[0]
        assert log[-1]["feature_cosine"] > log[0]["feature_cosine"]

    def test_step_that_is_not_finite_is_skipped_and_counted(self, tmp_path):
        poisoned, clean = Regression(), Regression()
        clean.load_state_dict(poisoned.state_dict())
        run(tmp_path / "a", Vectors(poison=(5, 6)), poisoned, max_train_steps=7, ema_decay=0.0)
        run(tmp_path / "b", objective=clean, max_train_steps=5, ema_decay=0.0)
        assert all(
            torch.equal(a, b) for a, b in zip(poisoned.model.parameters(), clean.model.parameters(), strict=True)
        )
        log = read_log(tmp_path / "a")
        assert [line["skipped_steps"] for line in log] == [0, 0, 1, 2]
        assert log[-1]["loss"] is None  # no finite value since step 6: null, as JSON knows no NaN

    def test_many_in_a_row_stop_the_run(self, tmp_path):
        with pytest.raises(FloatingPointError, match="not finite in 4 steps in a row up to step 6"):
            run(tmp_path, Vectors(poison=range(2, 100)), max_nonfinite_steps=3)

    def test_few_in_a_row_do_not(self, tmp_path):
        run(tmp_path, Vectors(poison=(2, 3, 5, 6, 8, 9)), max_nonfinite_steps=3, logging_steps=1)

    def test_clipping(self, tmp_path):
        norms = []
        for limit in (1e-3, 0.0):
            torch.manual_seed(0)
            objective = Regression()
            before = [p.detach().clone() for p in objective.model.parameters()]
            run(tmp_path / str(limit), objective=objective, max_train_steps=1, max_grad_norm=limit, ema_decay=0.0)
            norms.append(read_log(tmp_path / str(limit))[0]["grad_norm"])
            assert any(not torch.equal(a, b) for a, b in zip(before, objective.model.parameters(), strict=True))
        assert norms[0] == norms[1] > 1e-3  # what is logged is the norm before clipping

    def test_accumulation_equals_a_larger_batch(self, tmp_path):
        pair = ImageNoise(), ImageNoise()
        pair[1].load_state_dict(pair[0].state_dict())
        run(tmp_path / "a", objective=pair[0], train_batch_size=4)
        run(tmp_path / "b", objective=pair[1], train_batch_size=2, gradient_accumulation_steps=2)
        for a, b in zip(*(objective.parameters() for objective in pair), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    def test_device_is_awaited_at_logging_steps_only(self, tmp_path, monkeypatch):
        waits = []
        for name in ("item", "tolist", "__bool__", "__float__"):
            original = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, lambda self, o=original, n=name: (waits.append(n), o(self))[1])
        counts = []
        for steps in (8, 80):
            waits.clear()
            run(tmp_path / str(steps), max_train_steps=steps, logging_steps=1000, checkpointing_steps=1000)
            counts.append(len(waits))
        assert counts[0] == counts[1]

    def test_schedule(self, tmp_path):
        rates = {}
        for name in ("constant", "cosine"):
            run(tmp_path / name, lr_scheduler=name, lr_warmup_steps=4, logging_steps=1, max_train_steps=8)
            rates[name] = [line["learning_rate"] for line in read_log(tmp_path / name)]
        # That of step 1 is logged after step 1; the last step is the one before a cosine reaches 0.
        assert rates["constant"] == pytest.approx([0, 0.0025, 0.005, 0.0075] + [0.01] * 4)
        assert rates["cosine"][:5] == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01])
        assert rates["cosine"][6] == pytest.approx(0.005) and 0 < rates["cosine"][7] < 0.002

    def test_cosine_to_another_rate_than_0(self, tmp_path):
        run(tmp_path, lr_scheduler="cosine", min_learning_rate=1e-4, logging_steps=1, max_train_steps=100)
        rates = [line["learning_rate"] for line in read_log(tmp_path) if "learning_rate" in line]
        assert rates[0] == pytest.approx(0.01) and rates[50] == pytest.approx(0.01 / 2, rel=0.02)
        assert 1e-4 < rates[-1] < 1.1e-4
        with pytest.raises(ValueError, match="min_learning_rate must be from 0 to learning_rate 0.01, got 0.02"):
            run(tmp_path, min_learning_rate=0.02)


class TestValidation:
    def test_sees_averaged_weights_in_eval_mode_and_disturbs_nothing(self, tmp_path):
        objective, seen = Regression(), []

        def validate(step):
            assert not objective.training and not torch.is_grad_enabled()
            seen.append((step, objective.model[0].weight.clone(), torch.rand(1).item()))
            return {"score": step / 10, "picture": Image.new("RGB", (4, 4))}

        saved = []
        _, _, results = run(
            tmp_path / "a",
            objective=objective,
            validate=validate,
            save=lambda: saved.append(objective.model[0].weight.clone()),
        )
        assert [step for step, _, _ in seen] == [5, 10, 12]
        assert len({number for _, _, number in seen}) == 1  # the same random numbers every time
        assert results["score"] == 1.2
        averaged = load_file(tmp_path / "a" / "checkpoint-12" / "ema.safetensors")["model.0.weight"]
        assert torch.equal(seen[-1][1], averaged) and torch.equal(saved[0], averaged)
        assert not torch.equal(objective.model[0].weight, averaged)
        assert [line["validation/score"] for line in read_log(tmp_path / "a") if "validation/score" in line] == [
            0.5,
            1,
            1.2,
        ]
        assert sorted(path.name for path in (tmp_path / "a" / "validation").iterdir()) == [
            f"picture-{step:07d}.png" for step in (5, 10, 12)
        ]

    def test_training_with_and_without_is_the_same(self, tmp_path):
        objectives = Regression(), Regression()
        objectives[1].load_state_dict(objectives[0].state_dict())
        run(tmp_path / "a", objective=objectives[0])
        run(tmp_path / "b", objective=objectives[1], validate=lambda step: {"noise": torch.randn(3).sum().item()})
        assert all(torch.equal(*pair) for pair in zip(*(o.parameters() for o in objectives), strict=True))

    def test_tensorboard(self, tmp_path):
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        run(tmp_path, report_to="tensorboard", validate=lambda step: {"picture": Image.new("RGB", (4, 4))})
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        assert {"loss", "grad_norm", "learning_rate"} <= set(events.Tags()["scalars"])
        assert events.Tags()["images"] == ["picture"]


class TestSwitches:
    def test_dry_run_writes_nothing(self, tmp_path):
        steps = []
        loop, _, _ = run(
            tmp_path / "run",
            dry_run=True,
            report_to="tensorboard",
            validate=lambda step: steps.append(step) or {"picture": Image.new("RGB", (4, 4))},
            save=lambda: pytest.fail("saved"),
        )
        assert loop.step == 1 and steps == [1]
        assert not (tmp_path / "run").exists()

    def test_gradient_checkpointing_gives_the_same_weights(self, tmp_path, image_folder):
        data = ImageData(DataArguments(dataset_name=str(image_folder), resolution=32))
        weights = []
        for checkpointing in (False, True):
            model = tiny_fae()
            folder = tmp_path / str(checkpointing)
            run(folder, data, FeatureObjective(model), max_train_steps=2, gradient_checkpointing=checkpointing)
            assert model.is_gradient_checkpointing == checkpointing
            weights.append(model.feature_decoder.blocks[0].attn.to_q.weight)
        torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)

    @pytest.mark.slow
    def test_compile_gives_the_same_weights(self, tmp_path):
        objectives = ImageNoise(), ImageNoise()
        objectives[1].load_state_dict(objectives[0].state_dict())
        for objective, compiled in zip(objectives, (False, True), strict=True):
            run(tmp_path / str(compiled), objective=objective, compile=compiled)
            assert (objective._compiled_call_impl is not None) == compiled
        for pair in zip(*(objective.parameters() for objective in objectives), strict=True):
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
