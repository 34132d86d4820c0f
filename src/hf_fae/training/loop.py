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
from accelerate.utils import gather_object, set_seed
from tqdm.auto import tqdm

from ..data.corrupt import CorruptionReport
from ..data.protocol import TrainingData
from ..objectives.base import Objective
from ..utils.atomic import atomic_write
from ..utils.locks import lock_folder
from ..utils.processes import on_main_process
from ..utils.randomness import ImageRandom
from ..utils.stopping import StopSignals
from .arguments import LoopArguments
from .checkpoints import check_same_order, clear_leftovers, find_checkpoint, remove_later, writing_checkpoint
from .flops import FlopShare
from .log import RunLog
from .meter import Meter, peak_memory
from .optimization import Optimization
from .processes import PREPARATION, make_accelerator, naming_hangs, set_patience
from .publish import check_hub, publish, training_run
from .state import remove_sharding


__all__ = ["LoopArguments", "TrainingLoop"]

logger = logging.getLogger(__name__)


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
        self._interval_so_far, self._validation_is_due = {}, False  # of a run that a signal has stopped
        tracker = args.report_to if args.report_to != "none" and not args.dry_run else None
        if tracker and find_spec(tracker) is None:
            logger.warning("report_to=%r but it is not installed: only log.jsonl is written", tracker)
            tracker = None
        self.accelerator = make_accelerator(
            args.mixed_precision,
            args.gradient_accumulation_steps,
            log_with=tracker,
            project_dir=str(self.output_dir),
        )
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        self.log = RunLog(self.output_dir, self.accelerator, args.dry_run)
        self.resume_from = self._open_folder()
        if args.allow_tf32:
            torch.set_float32_matmul_precision("high")
        set_seed(args.seed)
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
            SystemExit: SIGTERM, SIGINT or SIGUSR1 was received; the step has been finished and a checkpoint written.
            TimeoutError: another process did not answer for `process_timeout` seconds.
            ValueError: too many rows of the data are corrupt (detected at a logging step), or the resumed run had its
                data in another order.
        """
        try:
            return self._run(objective, data, validate, save)
        finally:
            if self._lock is not None:
                self._lock.release()

    def _run(self, objective, data, validate, save):
        args = self.args
        batches = self._prepare(objective, data)
        results = self._train(batches, validate)
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

    def _train(self, batches, validate):
        """Train up to the last step; returns the result of the last validation, if there was one."""
        args, meter = self.args, self.meter
        max_steps = self.step + 1 if args.dry_run else args.max_train_steps
        patience = timedelta(seconds=args.process_timeout)
        results = self._validate(validate) if validate and self._validation_is_due else None
        progress = tqdm(initial=self.step, total=max_steps, disable=not self.is_main, desc="training", unit="step")
        meter.start(self.images_seen, self._interval_so_far)
        set_patience(patience)
        stop_signals = StopSignals("the training step", self.is_main, patience)
        with stop_signals as signals, naming_hangs(patience):
            while self.step < max_steps:
                self._train_step(batches)
                progress.update()
                is_last, received = self.step == max_steps, signals.vote()
                validates = validate is not None and (self.step % args.validation_steps == 0 or is_last)
                is_checkpoint = self.step % args.checkpointing_steps == 0 or is_last
                if self.step % args.logging_steps == 0 or is_checkpoint:  # no interval extends over a checkpoint
                    progress.set_postfix(self._log_interval())
                if received and not args.dry_run:
                    progress.close()
                    self._save_and_exit(received, validates)
                if validates:
                    results = self._validate(validate)
                if is_checkpoint and not args.dry_run:  # after the validation: its numbers are then in the log
                    with meter.paused():
                        self._save_checkpoint()
        progress.close()
        set_patience(PREPARATION)
        return results

    def _save_and_exit(self, received, validation_is_due):
        """Stop for a signal: the resumed run continues as if there had been none, also in its log."""
        self._save_checkpoint(validation_is_due)
        self.print(f"stopped by signal {received}: checkpoint-{self.step} is saved")
        self.accelerator.end_training()
        raise SystemExit(128 + received)

    def _open_folder(self):
        """Lock `output_dir`, and find the checkpoint to resume from; the main process does, and tells the others."""
        self._lock = None
        found = on_main_process(self.is_main, self._lock_and_find)
        if not all(gather_object([found is None or (found / "state.json").is_file()])):
            raise ValueError(
                f"resume_from_checkpoint {self.args.resume_from_checkpoint!r} is not the same for all processes, "
                f"{str(found)!r} for the first: output_dir must be on a disk that they share"
            )
        return found

    def _lock_and_find(self):
        args = self.args
        if self.output_dir.is_dir() and not args.dry_run:  # before anything in it is read
            self._lock = lock_folder(self.output_dir)
        found = find_checkpoint(self.output_dir, args.resume_from_checkpoint, fresh=not args.dry_run)
        if found is not None:
            step = json.loads((found / "state.json").read_text())["step"]
            if step > args.max_train_steps:
                raise ValueError(
                    f"max_train_steps must be at least {step} to resume from {str(found)!r}, got "
                    f"{args.max_train_steps}"
                )
        check_hub(args)
        if not args.dry_run:
            try:
                self.output_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"output_dir {str(self.output_dir)!r} cannot be written: {error.strerror}") from error
            self._lock = self._lock or lock_folder(self.output_dir)
            clear_leftovers(self.output_dir)
        return found

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
            self.log.truncate(self.step, drop_validation=self._validation_is_due)
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
        means = self.meter.means(self._sum_over_processes)
        skipped_in_a_row, skipped = self.optimization.skipped_steps()
        speed = self.meter.speed(self.images_seen)
        rate = speed["images_per_second"]
        self._share_corrupt_rows()
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

    def _share_corrupt_rows(self):
        self.corrupt_rows.add(gather_object(self._new_corrupt_rows))  # every process has the report of all
        self._new_corrupt_rows = []

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

    def _save_checkpoint(self, validation_is_due=False):
        limit = self.args.checkpoints_total_limit
        self._share_corrupt_rows()
        interval = self.meter.sums(self._sum_over_processes)
        with writing_checkpoint(self.output_dir, self.step, limit, self.is_main) as folder:
            state = {
                "step": self.step,
                "images_seen": self.images_seen,
                "data": self._data_signature,
                "corrupt_rows": self.corrupt_rows.state(),
                "interval": interval,
                "validation_is_due": validation_is_due,
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
        # The sums are those of all processes: one of them continues with them.
        self._interval_so_far = {
            name: torch.tensor(pair if self.is_main else [0.0, 0.0], device=self.device)
            for name, pair in state["interval"].items()
        }
        self._validation_is_due = state["validation_is_due"]
        self.print(f"resumed from {self.resume_from} after {self.images_seen:,} images")

    def _sum_over_processes(self, table):
        return self.accelerator.reduce(table, "sum")
