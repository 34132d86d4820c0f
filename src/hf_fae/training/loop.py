"""The one training loop: everything that every run needs and no script repeats.

A script brings an objective and data; the loop owns devices and processes (Accelerate), the optimiser, its schedule,
EMA, checkpoints, logs and validation. An interrupted run resumes bit-exactly: the random numbers of a step depend only
on (seed, step) and on the numbers of its images, and the data only on the number of images seen.
"""

import json
import logging
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from operator import length_hint
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from tqdm.auto import tqdm

from ..data.corrupt import CorruptionReport
from ..data.protocol import TrainingData
from ..objectives.base import Objective
from ..utils.atomic import atomic_write
from ..utils.randomness import ImageRandom
from .arguments import LoopArguments
from .checkpoints import check_same_order, clear_leftovers, find_checkpoint, remove_later, writing_checkpoint
from .flops import FlopShare
from .log import RunLog
from .meter import Meter, peak_memory
from .optimization import Optimization
from .publish import check_hub, publish, training_run
from .state import remove_sharding


__all__ = ["PATIENCE", "LoopArguments", "TrainingLoop"]

logger = logging.getLogger(__name__)

# Other processes wait while one prepares a large data set or measures statistics: longer than torch's ten minutes.
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=6))


class TrainingLoop:
    """Trains one objective.

    Args:
        args: see `LoopArguments`.
        config: all arguments of the run as plain values, written to `output_dir/config.yaml` and into the model card;
            without it there is no card.

    Attributes:
        accelerator, device: where the run takes place; ready before the objective is built.
        is_main: whether this is the main process.
        resume_from: the checkpoint to resume from; None for a new run.
        step, images_seen: optimiser steps taken, and images of all processes together.
        corrupt_rows: the rows that the data could not use, by kind.

    Raises:
        ValueError: `output_dir` holds checkpoints and `resume_from_checkpoint` does not say what to do with them, or
            names none; or `push_to_hub` is set and pushing would fail.
    """

    def __init__(self, args: LoopArguments, config: dict | None = None):
        self.args, self.config = args, config or {}
        self.output_dir = Path(args.output_dir)
        self.step = self.images_seen = 0
        self.corrupt_rows, self._new_corrupt_rows, self.meter = CorruptionReport(), [], Meter()
        tracker = args.report_to if args.report_to != "none" and not args.dry_run else None
        if tracker and find_spec(tracker) is None:
            logger.warning("report_to=%r but it is not installed: only log.jsonl is written", tracker)
            tracker = None
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=tracker,
            project_dir=str(self.output_dir),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False), PATIENCE],
        )
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        self.log = RunLog(self.output_dir, self.accelerator, args.dry_run)
        self.resume_from = self._find_checkpoint()
        if self.is_main:
            check_hub(args)
        if args.allow_tf32:
            torch.set_float32_matmul_precision("high")
        set_seed(args.seed)
        if self.is_main and not args.dry_run:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            clear_leftovers(self.output_dir)
        if tracker:
            plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in self.config.items()}
            project = "tensorboard" if tracker == "tensorboard" else "hf_fae"  # its folder, or the project's name
            self.accelerator.init_trackers(project, plain)

    def print(self, message: str) -> None:
        """Print on the main process, above the progress bar."""
        self.log.print(message)

    def run(
        self,
        objective: Objective,
        data: TrainingData,
        validate: Callable[[int], dict] | None = None,
        save: Callable[[], None] | None = None,
    ) -> dict | None:
        """Train until `max_train_steps`.

        Args:
            objective: see `Objective`; its parameters with `requires_grad` are trained.
            data: see `TrainingData`.
            validate: called with the step under EMA weights, in eval mode, without gradient, on every process, with
                the same random seed every time; returns numbers (logged) and PIL images (written to `validation/`).
            save: called at the end under EMA weights on the main process; the card is written next to its files.

        Returns:
            The result of the last validation.

        Raises:
            FloatingPointError: `max_nonfinite_steps` gradients in a row were not finite (detected at a logging step).
            ValueError: too many rows of the data are corrupt (detected at a logging step), or the resumed run had its
                data in another order.
        """
        args, meter = self.args, self.meter
        batches = self._prepare(objective, data)
        max_steps = self.step + 1 if args.dry_run else args.max_train_steps
        results = None
        progress = tqdm(initial=self.step, total=max_steps, disable=not self.is_main, desc="training", unit="step")
        meter.start(self.images_seen)
        while self.step < max_steps:
            self._train_step(batches)
            progress.update()
            is_checkpoint = self.step % args.checkpointing_steps == 0 or self.step == max_steps
            if self.step % args.logging_steps == 0 or is_checkpoint:  # no interval extends over a checkpoint
                progress.set_postfix(self._log_interval())
            if validate and (self.step % args.validation_steps == 0 or self.step == max_steps):
                results = self._validate(validate)
            if is_checkpoint and not args.dry_run:  # after the validation: its numbers are then in the log
                with meter.paused():
                    self._save_checkpoint()
        progress.close()

        if validate and results is None:  # a finished run, resumed: its log is complete
            results = self._validate(validate, log=False)
        self._report_corrupt_rows()
        if save and not args.dry_run:
            with self.optimization.averaged_weights():
                if self.accelerator.is_fsdp2:
                    remove_sharding(objective)
                if self.is_main:
                    save()
            self.print(f"saved to {self.output_dir}")
            self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        # After the other processes have ended: none of them waits for an upload.
        if save and self.is_main and self.config and not args.dry_run:
            run = training_run(
                self.config, self.step, self.images_seen, results, data=data, accelerator=self.accelerator
            )
            publish(args, run)
        return results

    def _find_checkpoint(self):
        """The checkpoint to resume from, found by the main process; all processes must see the same files."""
        args = self.args
        found = find_checkpoint(self.output_dir, args.resume_from_checkpoint, fresh=not args.dry_run)
        (main,) = broadcast_object_list([found])
        if any(other != main for other in gather_object([found])):
            raise ValueError(
                f"resume_from_checkpoint {args.resume_from_checkpoint!r} is not the same for all processes, here "
                f"{str(found)!r}: output_dir must be on a disk that they share"
            )
        return main

    def _prepare(self, objective, data):
        """Optimisation, resume, the files of the run; the batches from there on."""
        args, accelerator = self.args, self.accelerator
        if args.gradient_checkpointing:
            objective.model.enable_gradient_checkpointing()
        readers = {"world_size": accelerator.num_processes, "num_workers": args.dataloader_num_workers}
        self._data_signature = data.signature(args.train_batch_size, **readers)
        self._num_rows = length_hint(data) or None  # unknown for a stream
        self.optimization = Optimization(args, accelerator, objective)
        self._flop_share, self._counted_terms = FlopShare(accelerator, self.optimization, args), None
        if self.resume_from:
            self._resume()
        if self.is_main and not args.dry_run:
            remove_later(self.output_dir, self.step)
            self.log.truncate(self.step)
            if self.config:
                atomic_write(self.output_dir / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
        name = type(objective.model).__name__
        self.print(f"training {self.optimization.num_parameters:,} parameters of {name} on {self.device}")
        return data.batches(
            args.train_batch_size, images_seen=self.images_seen, rank=accelerator.process_index, **readers
        )

    def _train_step(self, batches):
        """Forward and backward passes of one optimiser step, and the step."""
        args, accelerator, meter = self.args, self.accelerator, self.meter
        rank, world_size = accelerator.process_index, accelerator.num_processes
        seed = np.random.SeedSequence((args.seed, rank, self.step))
        torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        self.optimization.module.before_step(self.step)
        for part in range(args.gradient_accumulation_steps):
            with meter.waiting_for_data():
                batch = next(batches)
                self._new_corrupt_rows += batch.pop("corrupt", ())
                batch = {name: self._to_device(value) for name, value in batch.items()}
            first_image = self.images_seen + (part * world_size + rank) * args.train_batch_size
            with accelerator.accumulate(self.optimization.objective):
                losses = self.optimization.objective(batch, ImageRandom(args.seed, first_image, self.device))
                accelerator.backward(losses["loss"])
            for name, value in losses.items():
                meter.add(name, value)
        for name, norm in self.optimization.update(self.step).items():
            meter.add(name, norm)
        if losses.keys() != self._counted_terms:  # in the first step, and when another network joins in
            with meter.paused():
                one_image = {name: value[:1] for name, value in batch.items()}
                self._flop_share.count(one_image, ImageRandom(args.seed, first_image, self.device))
            self._counted_terms = losses.keys()
        self.step += 1
        self.images_seen += args.train_batch_size * args.gradient_accumulation_steps * world_size

    def _to_device(self, value):
        return value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    def _log_interval(self):
        """Log the means since the last log; returns numbers for the progress bar.

        The only place where the host synchronises with the device.
        """
        means = self.meter.means(lambda table: self.accelerator.reduce(table, "sum"))
        skipped_in_a_row, skipped = self.optimization.skipped_steps()
        speed = self.meter.speed(self.images_seen)
        rate = speed["images_per_second"]
        self.corrupt_rows.add(gather_object(self._new_corrupt_rows))  # every process has the report of all
        self._new_corrupt_rows = []
        corrupt = sum(self.corrupt_rows.counts().values())
        entry = {
            **means,
            **self.optimization.learning_rates(),
            "skipped_steps": skipped,
            **({"corrupt_rows": corrupt} if corrupt else {}),
            **{name: round(value, 4) for name, value in speed.items()},
            "flop_share": round(self._flop_share.at(rate), 4),
            "peak_memory_gib": round(peak_memory(self.device), 3),
        }
        self.log.write(entry, self.step, self.images_seen)
        if skipped_in_a_row >= self.args.max_nonfinite_steps:
            raise FloatingPointError(
                f"the gradient was not finite in {skipped_in_a_row} steps in a row up to step {self.step} "
                f"(max_nonfinite_steps={self.args.max_nonfinite_steps}); the weights are those before them: lower "
                f"learning_rate, or train with mixed_precision='no' instead of {self.args.mixed_precision!r}"
            )
        self.corrupt_rows.check(self.images_seen, self.args.max_corrupt_share, self._num_rows)
        self.meter.start(self.images_seen)
        loss = means["loss"]
        return {"loss": "not finite" if loss is None else f"{loss:.4g}", "images/s": f"{rate:.1f}"}

    def _validate(self, validate, log=True):
        module, optimization = self.optimization.module, self.optimization
        with self.meter.paused():
            module.eval()
            torch.manual_seed(self.args.seed)
            with optimization.averaged_weights(), optimization.unsharded_root():
                with torch.no_grad(), self.accelerator.autocast():
                    results = validate(self.step)
            module.train()
            numbers = {f"validation/{k}": float(v) for k, v in results.items() if isinstance(v, (int, float))}
            if numbers and log:
                self.log.write(numbers, self.step, self.images_seen)
                self.print(f"step {self.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in numbers.items()))
            if log:
                self.log.save_images({k: v for k, v in results.items() if hasattr(v, "save")}, self.step)
        return results

    def _report_corrupt_rows(self):
        """Tell at the end which rows could not be used, by kind."""
        counts = self.corrupt_rows.counts()
        if counts:
            self.print("corrupt rows were replaced: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))
            if self.is_main and not self.args.dry_run:
                path = self.output_dir / "damaged_rows.json"  # the name that published runs have
                atomic_write(path, json.dumps(self.corrupt_rows.state(), indent=1))

    def _save_checkpoint(self):
        limit = self.args.checkpoints_total_limit
        with writing_checkpoint(self.output_dir, self.step, limit, self.is_main) as folder:
            state = {
                "step": self.step,
                "images_seen": self.images_seen,
                "data": self._data_signature,
                "corrupt_rows": self.corrupt_rows.state(),
                **self.optimization.save(folder),
            }
            if self.is_main:
                (folder / "state.json").write_text(json.dumps(state))
        self.accelerator.wait_for_everyone()

    def _resume(self):
        state = json.loads((self.resume_from / "state.json").read_text())
        check_same_order(self.resume_from, before=state["data"], now=self._data_signature)
        self.optimization.load(self.resume_from, state)
        self.step, self.images_seen = state["step"], state["images_seen"]
        self.corrupt_rows.load(state["corrupt_rows"])
        self.print(f"resumed from {self.resume_from} after {self.images_seen:,} images")
