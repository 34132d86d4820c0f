"""The one training loop: everything that every run needs and no script repeats.

A script brings an objective and data; the loop owns devices and processes (Accelerate), the optimiser, its schedule,
EMA, checkpoints, logs and validation. An interrupted run that is started again gives the same weights to the bit: the
random numbers of a step depend on (seed, rank, step) only, and the data on the number of images seen.
"""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from .arguments import LoopArguments
from .checkpoints import clear_leftovers, commit_checkpoint, find_checkpoint


__all__ = ["LoopArguments", "TrainingLoop"]

logger = logging.getLogger(__name__)


class TrainingLoop:
    """Trains one objective.

    Args:
        args: see `LoopArguments`.
        config: all arguments of the run as plain values, written to `output_dir/config.yaml`.

    Attributes:
        accelerator, device: where the run takes place; ready before the objective is built.
        step, images_seen: optimiser steps taken, and images of all processes together.

    Raises:
        ValueError: `output_dir` holds checkpoints and `resume_from_checkpoint` does not say what to do with them, or
            names none.
    """

    def __init__(self, args: LoopArguments, config: dict | None = None):
        self.args = args
        self.output_dir = Path(args.output_dir)
        self.step = self.images_seen = 0
        self.resume_from = find_checkpoint(self.output_dir, args.resume_from_checkpoint, fresh=not args.dry_run)
        tracker = args.report_to if args.report_to != "none" and not args.dry_run else None
        if tracker and find_spec(tracker) is None:
            logger.warning("report_to=%r but it is not installed: only log.jsonl is written", tracker)
            tracker = None
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=tracker,
            project_dir=str(self.output_dir),
            step_scheduler_with_optimizer=False,  # else the schedule would advance once per process and step
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        set_seed(args.seed)
        if self.is_main and not args.dry_run:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            clear_leftovers(self.output_dir)
            if config:
                (self.output_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        if tracker:
            plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in (config or {}).items()}
            self.accelerator.init_trackers("tensorboard", plain)

    def print(self, message: str) -> None:
        """Print on the main process, above the progress bar."""
        if self.is_main:
            tqdm.write(message)

    def run(
        self,
        objective: torch.nn.Module,
        data,
        validate: Callable[[int], dict] | None = None,
        save: Callable[[], None] | None = None,
    ) -> dict | None:
        """Train until `max_train_steps`.

        Args:
            objective: `objective(batch)` returns a dict of scalar tensors, "loss" and whatever shall be logged; its
                parameters with `requires_grad` are trained; `objective.model` is the model they belong to.
            data: `data.batches(batch_size, images_seen=, rank=, world_size=, num_workers=)` gives endless batches.
            validate: called with the step under EMA weights, in eval mode, without gradient, on every process, after
                the same seed every time; returns numbers (logged) and PIL pictures (written to `validation/`).
            save: called at the end under EMA weights on the main process.

        Returns:
            What the last call of `validate` returned.

        Raises:
            FloatingPointError: `max_nonfinite_steps` gradients in a row were not finite (seen at a logging step).
        """
        args, accelerator = self.args, self.accelerator
        if args.gradient_checkpointing:
            objective.model.enable_gradient_checkpointing()
        self._prepare(objective)
        max_steps = self.step + 1 if args.dry_run else args.max_train_steps
        batch_size, accumulation = args.train_batch_size, args.gradient_accumulation_steps
        batches = data.batches(
            batch_size,
            images_seen=self.images_seen,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=args.dataloader_num_workers,
        )

        results = None
        progress = tqdm(initial=self.step, total=max_steps, disable=not self.is_main, desc="training", unit="step")
        self._start_interval()
        while self.step < max_steps:
            seed = np.random.SeedSequence((args.seed, accelerator.process_index, self.step))
            torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> np.uint64(1)))
            for _ in range(accumulation):
                waiting = time.perf_counter()
                batch = {k: v.to(self.device, non_blocking=True) for k, v in next(batches).items()}
                self.input_seconds += time.perf_counter() - waiting
                with accelerator.accumulate(self.objective):
                    losses = self.objective(batch)
                    accelerator.backward(losses["loss"])
                for name, value in losses.items():
                    self._add(name, value.detach().float())
            self._update()
            self.step += 1
            self.images_seen += batch_size * accumulation * accelerator.num_processes
            progress.update()

            checkpoint = self.step % args.checkpointing_steps == 0 or self.step == max_steps
            if self.step % args.logging_steps == 0 or checkpoint:  # no interval reaches over a checkpoint
                progress.set_postfix(self._log_interval())
            if validate and (self.step % args.validation_steps == 0 or self.step == max_steps):
                results = self._validate(validate)
            if checkpoint and not args.dry_run:  # after the validation: what a checkpoint follows is in the log
                self._save_checkpoint()
        progress.close()

        if validate and results is None:  # a finished run, resumed
            results = self._validate(validate)
        if save and not args.dry_run:
            with self.ema_weights():
                if self.is_main:
                    save()
            self.print(f"saved to {self.output_dir}")
            accelerator.wait_for_everyone()
        accelerator.end_training()
        return results

    @contextlib.contextmanager
    def ema_weights(self):
        """Within this context the model has its averaged weights (its own where `ema_decay` is 0)."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def _prepare(self, objective):
        """Optimiser, schedule, wrapping for the devices, resume, EMA: in this order."""
        args, accelerator = self.args, self.accelerator
        self.module = objective.train()
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        betas = (args.adam_beta1, args.adam_beta2)
        # The fused AdamW looks at `found_inf` on the device: a step is skipped without waiting for the device.
        optimizer = torch.optim.AdamW(
            self.parameters, args.learning_rate, betas, weight_decay=args.weight_decay, fused=True
        )
        name = {"constant": "constant_with_warmup"}.get(args.lr_scheduler, args.lr_scheduler)
        scheduler = get_scheduler(
            name, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
        )
        if args.compile:
            objective.compile()
        self.objective, self.optimizer, self.scheduler = accelerator.prepare(objective, optimizer, scheduler)
        self.nonfinite_row, self.nonfinite_total = torch.zeros(2, device=self.device).unbind()

        accelerator.register_save_state_pre_hook(self._write_weights)
        accelerator.register_load_state_pre_hook(self._read_weights)
        if self.resume_from:
            accelerator.load_state(self.resume_from)
            state = json.loads((self.resume_from / "state.json").read_text())
            self.step, self.images_seen = state["step"], state["images_seen"]
            self.nonfinite_row += state["nonfinite_row"]
            self.nonfinite_total += state["nonfinite_total"]
            self.print(f"resumed from {self.resume_from} after {self.images_seen:,} images")
        self._truncate_log()
        self.ema = EMAModel(self.parameters, decay=args.ema_decay, foreach=True) if args.ema_decay else None
        if self.ema is not None:
            self.ema.to(dtype=torch.float32)
            if self.resume_from:
                averaged = load_file(self.resume_from / "ema.safetensors", device=str(self.device))
                self.ema.shadow_params = [averaged[name] for name in self._trainable_names()]
                self.ema.optimization_step = self.step
        count = sum(p.numel() for p in self.parameters)
        self.print(f"training {count:,} parameters of {type(objective.model).__name__} on {self.device}")

    def _update(self):
        """One optimiser step, or none where the gradient is not finite: decided on the device."""
        limit = self.args.max_grad_norm or math.inf
        grad_norm = self.accelerator.clip_grad_norm_(self.parameters, limit).detach()
        finite = torch.isfinite(grad_norm)
        bad = (~finite).float()
        if self.accelerator.scaler is None:  # fp16's loss scaler does this itself
            self.optimizer.optimizer.found_inf = bad
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.parameters)
        self.nonfinite_row = (self.nonfinite_row + bad) * bad
        self.nonfinite_total = self.nonfinite_total + bad
        self._add("grad_norm", grad_norm)

    def _add(self, name, value):
        """Add to the interval's sum; a value that is not finite leaves sum and count as they are."""
        finite = torch.isfinite(value)
        total, count = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (total + torch.where(finite, value, 0.0), count + finite.float())

    def _start_interval(self):
        self.sums, self.interval_start, self.interval_images = {}, time.perf_counter(), self.images_seen
        self.input_seconds = 0.0

    def _log_interval(self):
        """The only place where the host waits for the device: means since the last log, to log and progress bar."""
        table = torch.stack([torch.stack(pair) for pair in self.sums.values()])
        table = self.accelerator.reduce(table, "sum").tolist()
        means = {name: total / count if count else None for name, (total, count) in zip(self.sums, table, strict=True)}
        row = int(self.nonfinite_row.item())
        seconds = time.perf_counter() - self.interval_start
        rate = (self.images_seen - self.interval_images) / seconds
        entry = {
            **means,
            "learning_rate": self.scheduler.get_last_lr()[0],
            "skipped_steps": int(self.nonfinite_total.item()),
            "images_per_second": round(rate, 2),
            "input_wait": round(self.input_seconds / seconds, 4),  # share of the time spent on waiting for data
        }
        if self.device.type == "cuda":
            entry["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        self._log(entry)
        if row >= self.args.max_nonfinite_steps:
            raise FloatingPointError(
                f"the gradient was not finite in {row} steps in a row up to step {self.step} (max_nonfinite_steps="
                f"{self.args.max_nonfinite_steps}); the weights are those before them: lower learning_rate, or train "
                f"with mixed_precision='no' instead of {self.args.mixed_precision!r}"
            )
        self._start_interval()
        loss = means["loss"]
        return {"loss": "not finite" if loss is None else f"{loss:.4g}", "images/s": f"{rate:.1f}"}

    def _log(self, entry):
        if self.args.dry_run:
            self.print(json.dumps(entry))
        elif self.is_main:
            with open(self.output_dir / "log.jsonl", "a") as log:
                log.write(json.dumps({"step": self.step, "images": self.images_seen, **entry}) + "\n")
            self.accelerator.log({k: v for k, v in entry.items() if v is not None}, step=self.step)

    def _truncate_log(self):
        """Drop the lines that an interrupted run wrote after its checkpoint: they will be written again."""
        path = self.output_dir / "log.jsonl"
        if self.is_main and path.exists() and not self.args.dry_run:
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line + "\n" for line in lines if json.loads(line)["step"] <= self.step]
            path.with_suffix(".part").write_text("".join(kept))
            path.with_suffix(".part").replace(path)

    def _validate(self, validate):
        start = time.perf_counter()
        self.module.eval()
        torch.manual_seed(self.args.seed)
        with self.ema_weights(), torch.no_grad(), self.accelerator.autocast():
            results = validate(self.step)
        self.module.train()
        numbers = {f"validation/{k}": float(v) for k, v in results.items() if isinstance(v, (int, float))}
        if numbers:
            self._log(numbers)
            self.print(f"step {self.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in numbers.items()))
        pictures = {k: v for k, v in results.items() if hasattr(v, "save")}
        if pictures and self.is_main and not self.args.dry_run:
            folder = self.output_dir / "validation"
            folder.mkdir(exist_ok=True)
            for name, picture in pictures.items():
                picture.save(folder / f"{name}-{self.step:07d}.png")
                for tracker in self.accelerator.trackers:
                    tracker.log_images({name: np.asarray(picture)[None]}, step=self.step, dataformats="NHWC")
        self.interval_start += time.perf_counter() - start
        return results

    def _trainable_names(self):
        return [name for name, p in self.module.named_parameters() if p.requires_grad]

    def _write_weights(self, models, weights, directory):
        """Accelerate's hook: trained parameters, buffers and the EMA in safetensors; frozen parts are not ours."""
        frozen = {name for name, p in self.module.named_parameters() if not p.requires_grad}
        state = {k: v.contiguous() for k, v in self.module.state_dict().items() if k not in frozen}
        if self.is_main:
            save_file(state, Path(directory) / "model.safetensors")
            if self.ema is not None:
                shadows = dict(zip(self._trainable_names(), self.ema.shadow_params, strict=True))
                save_file(shadows, Path(directory) / "ema.safetensors")
        weights.clear()

    def _read_weights(self, models, directory):
        state = load_file(Path(directory) / "model.safetensors", device=str(self.device))
        missing, unexpected = self.module.load_state_dict(state, strict=False)
        missing = set(missing) - {name for name, p in self.module.named_parameters() if not p.requires_grad}
        if missing or unexpected:
            raise ValueError(
                f"checkpoint {str(directory)!r} does not fit the objective: it lacks {sorted(missing)[:3]} and has "
                f"{unexpected[:3]} that are not asked for"
            )
        models.clear()

    def _save_checkpoint(self):
        start = time.perf_counter()
        partial = self.output_dir / f".checkpoint-{self.step}"
        self.accelerator.save_state(str(partial))  # on every process: sharded states need all of them
        if self.is_main:
            state = {
                "step": self.step,
                "images_seen": self.images_seen,
                "nonfinite_row": self.nonfinite_row.item(),
                "nonfinite_total": self.nonfinite_total.item(),
            }
            (partial / "state.json").write_text(json.dumps(state))
        self.accelerator.wait_for_everyone()
        if self.is_main:
            commit_checkpoint(partial, self.args.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()
        self.interval_start += time.perf_counter() - start
