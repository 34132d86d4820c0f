import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factories import tiny_fae
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from hf_fae.training.arguments import LoopArguments
from hf_fae.training.data import DataArguments, ImageData
from hf_fae.training.loop import TrainingLoop
from hf_fae.training.objectives import FeatureObjective, Objective


class Stopped(BaseException):
    """Stands for a kill: nothing catches it."""


class Vectors:
    """Endless batches of vectors that depend on the image's number only; a kill can be booked."""

    def __init__(self, kill_after=None, poison=()):
        self.kill_after, self.poison = kill_after, poison

    def batches(self, batch_size, *, images_seen=0, rank=0, world_size=1, num_workers=0):
        for start in range(images_seen + rank * batch_size, 10**9, world_size * batch_size):
            if self.kill_after is not None and start >= self.kill_after:
                raise Stopped
            rows = [
                torch.randn(8, generator=torch.Generator().manual_seed(n)) for n in range(start, start + batch_size)
            ]
            yield {"x": torch.stack(rows) * (float("nan") if start // batch_size in self.poison else 1.0)}


class Regression(Objective):
    """A small network with frozen part, buffer and noise: all that a checkpoint has to care for."""

    def __init__(self):
        model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
        super().__init__(model, [model])
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        with torch.no_grad():  # as if loaded: the same in every run
            self.frozen.weight.copy_(torch.linspace(-1, 1, 64).view(8, 8).sin())
            self.frozen.bias.zero_()
        self.register_buffer("offset", torch.rand(8))

    def forward(self, batch, random):
        # One noise belongs to the image, the other to the step.
        noise = random.normal(*batch["x"].shape) + torch.randn_like(batch["x"])
        prediction = self.model(batch["x"] + 0.1 * noise)
        loss = (prediction - self.frozen(batch["x"]) - self.offset).float().square().mean()
        return {"loss": loss, "twice": 2 * loss.detach()}


class ImageNoise(Regression):
    """All of its noise belongs to images, so that it does not matter how they are divided into batches."""

    def forward(self, batch, random):
        noise = 0.1 * random.normal(*batch["x"].shape) * random.uniform(len(batch["x"]), 1)
        return {"loss": (self.model(batch["x"] + noise) - self.frozen(batch["x"])).square().mean()}


def arguments(folder, **kwargs):
    defaults = {
        "max_train_steps": 12,
        "train_batch_size": 4,
        "learning_rate": 1e-2,
        "ema_decay": 0.9,
        "logging_steps": 3,
        "checkpointing_steps": 4,
        "validation_steps": 5,
        "report_to": "none",
    }
    return LoopArguments(output_dir=str(folder), **{**defaults, **kwargs})


def run(folder, data=None, objective=None, validate=None, save=None, **kwargs):
    loop = TrainingLoop(arguments(folder, **kwargs))
    objective = objective or Regression()
    results = loop.run(objective, data or Vectors(), validate, save)
    return loop, objective, results


def read_log(folder):
    """The log without speed and memory, which no two runs share."""
    machine = ("images_per_second", "input_wait", "flop_share", "peak_memory_gib")
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in machine} for line in lines]


def assert_equal_checkpoints(*folders):
    """Weights, averages and optimiser state, to the bit."""
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        one, other = (load_file(folder / name) for folder in folders)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    assert len({(folder / "state.json").read_text() for folder in folders}) == 1


def checkpoints(folder):
    return sorted(path.name for path in Path(folder).glob("checkpoint-*"))


class TestResume:
    # A kill in step 6 (after checkpoint 4) and, on the way again, in step 10 (after checkpoint 8).
    @pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
    def test_killed_twice_equals_never_killed_to_the_bit(self, tmp_path, mixed_precision):
        kwargs = {
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
        run(tmp_path)
        log, called = (tmp_path / "log.jsonl").read_text(), []
        run(tmp_path, save=lambda: called.append("save"), resume_from_checkpoint="latest")
        assert called == ["save"]
        assert (tmp_path / "log.jsonl").read_text() == log

    def test_latest_without_checkpoints_starts_a_new_log(self, tmp_path):
        (tmp_path / "log.jsonl").write_text('{"step": 3, "loss": 1.0}\n{"step": 6, "lo')  # killed before checkpoint 1
        assert run(tmp_path, resume_from_checkpoint="latest")[0].step == 12
        assert [line["step"] for line in read_log(tmp_path)] == [3, 4, 6, 8, 9, 12]

    def test_run_that_would_overwrite_another_is_refused(self, tmp_path):
        run(tmp_path)
        with pytest.raises(ValueError, match="holds checkpoint-12: pass resume_from_checkpoint='latest'"):
            run(tmp_path)

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

        monkeypatch.setattr("hf_fae.training.loop.commit_checkpoint", killed)
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
        assert rates["constant"] == pytest.approx([0.0025, 0.005, 0.0075] + [0.01] * 5)
        assert rates["cosine"][:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
        assert rates["cosine"][5] == pytest.approx(0.005) and rates["cosine"][7] == pytest.approx(0, abs=1e-9)


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


def run_image_noise(folder, batch_size):
    torch.manual_seed(0)
    loop, _, _ = run(folder, objective=ImageNoise(), train_batch_size=batch_size, validate=lambda step: {"one": 1.0})
    assert (loop.step, loop.images_seen) == (12, 48)


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    run_image_noise(tmp_path / "one", 4)
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(Path(__file__).parents[1])!r}, {str(Path(__file__).parent)!r}]\n"
        f"import test_loop; test_loop.run_image_noise({str(tmp_path / 'two')!r}, 2)\n"
    )
    # What `accelerate launch` does on several devices; on a CPU alone it starts one process.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    subprocess.run(launch, check=True, timeout=300, env={**os.environ, "ACCELERATE_USE_CPU": "true"})
    for name in ("model.safetensors", "ema.safetensors"):
        one, two = (load_file(tmp_path / folder / "checkpoint-12" / name) for folder in ("one", "two"))
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=1e-5, atol=1e-6)
    one, two = (read_log(tmp_path / folder) for folder in ("one", "two"))
    assert [line["images"] for line in one] == [line["images"] for line in two]
    losses = [[line["loss"] for line in log if "loss" in line] for log in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
