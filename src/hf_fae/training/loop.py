"""The one training loop: everything that every run needs and no script repeats.

A script brings an objective and data; the loop owns devices and processes (Accelerate), the optimiser, its schedule,
EMA, checkpoints, logs and validation. An interrupted run that is started again gives the same weights to the bit: the
random numbers of a step depend on (seed, step) and on the images' numbers only, and the data on the number of images
seen.
"""

import contextlib
import json
import logging
import math
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
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm
from transformers import get_scheduler

from ..data.corrupt import DamageReport
from ..objectives.base import Objective
from ..utils.atomic import atomic_write
from ..utils.randomness import ImageRandom
from .arguments import LoopArguments
from .checkpoints import clear_leftovers, commit_checkpoint, find_checkpoint, remove_later
from .flops import FlopMeter, matmul_peak
from .meter import Meter, peak_memory
from .publish import check_hub, publish, training_run
from .state import load_tensors, remove_sharding, save_tensors


__all__ = ["PATIENCE", "LoopArguments", "TrainingLoop"]

logger = logging.getLogger(__name__)

# The others wait while one process prepares a large data set or takes statistics: longer than torch's ten minutes.
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=6))


def name_of(group: dict, value: str) -> str:
    """What a value of a parameter group is called in the log."""
    return f"{group['name']}_{value}" if group["name"] else value


class TrainingLoop:
    """Trains one objective.

    Args:
        args: see `LoopArguments`.
        config: all arguments of the run as plain values, written to `output_dir/config.yaml` and into the card of
            what is saved; without it there is no card.

    Attributes:
        accelerator, device: where the run takes place; ready before the objective is built.
        step, images_seen: optimiser steps taken, and images of all processes together.
        damage: the rows that the data could not use, by kind.

    Raises:
        ValueError: `output_dir` holds checkpoints and `resume_from_checkpoint` does not say what to do with them, or
            names none; or `push_to_hub` is set and the Hub would refuse.
    """

    def __init__(self, args: LoopArguments, config: dict | None = None):
        self.args, self.config = args, config or {}
        self.output_dir = Path(args.output_dir)
        self.step = self.images_seen = 0
        self.damage, self.new_damage, self.meter = DamageReport(), [], Meter()
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

    def _find_checkpoint(self):
        """Where to go on from: what the main process finds, if all processes see the same files."""
        args = self.args
        found = find_checkpoint(self.output_dir, args.resume_from_checkpoint, fresh=not args.dry_run)
        (main,) = broadcast_object_list([found])
        if any(other != main for other in gather_object([found])):
            raise ValueError(
                f"resume_from_checkpoint {args.resume_from_checkpoint!r} is not the same for all processes, here "
                f"{str(found)!r}: output_dir must be on a disk that they share"
            )
        return main

    def print(self, message: str) -> None:
        """Print on the main process, above the progress bar."""
        if self.is_main:
            tqdm.write(message)

    def run(
        self,
        objective: Objective,
        data,
        validate: Callable[[int], dict] | None = None,
        save: Callable[[], None] | None = None,
    ) -> dict | None:
        """Train until `max_train_steps`.

        Args:
            objective: see `Objective`; its parameters with `requires_grad` are trained.
            data: `data.batches(batch_size, images_seen=, rank=, world_size=, num_workers=)` gives endless batches:
                dicts of tensors and lists; the list "damaged", if any, goes into the report of damaged rows.
                `data.signature(batch_size, world_size, num_workers)` says in plain values what the order depends on.
            validate: called with the step under EMA weights, in eval mode, without gradient, on every process, after
                the same seed every time; returns numbers (logged) and PIL pictures (written to `validation/`).
            save: called at the end under EMA weights on the main process; the card is written beside what it saves.

        Returns:
            What the last call of `validate` returned.

        Raises:
            FloatingPointError: `max_nonfinite_steps` gradients in a row were not finite (seen at a logging step).
            ValueError: too many rows of the data are damaged (seen at a logging step), or the run to go on from had
                its data in another order.
        """
        args, accelerator, meter = self.args, self.accelerator, self.meter
        if args.gradient_checkpointing:
            objective.model.enable_gradient_checkpointing()
        rank, world_size = accelerator.process_index, accelerator.num_processes
        self.data_signature = data.signature(args.train_batch_size, world_size, args.dataloader_num_workers)
        self.num_rows = length_hint(data) or None  # unknown of a stream
        self._prepare(objective)
        max_steps = self.step + 1 if args.dry_run else args.max_train_steps
        batch_size, accumulation = args.train_batch_size, args.gradient_accumulation_steps
        batches = data.batches(
            batch_size,
            images_seen=self.images_seen,
            rank=rank,
            world_size=world_size,
            num_workers=args.dataloader_num_workers,
        )

        results, counted_terms = None, None
        progress = tqdm(initial=self.step, total=max_steps, disable=not self.is_main, desc="training", unit="step")
        meter.start(self.images_seen)
        while self.step < max_steps:
            seed = np.random.SeedSequence((args.seed, rank, self.step))
            torch.manual_seed(int(seed.generate_state(1, np.uint64)[0] >> np.uint64(1)))
            objective.before_step(self.step)
            for part in range(accumulation):
                with meter.waiting_for_data():
                    batch = next(batches)
                    self.new_damage += batch.pop("damaged", ())
                    batch = {k: self._to_device(v) for k, v in batch.items()}
                first_image = self.images_seen + (part * world_size + rank) * batch_size
                random = ImageRandom(args.seed, first_image, self.device)
                with accelerator.accumulate(self.objective):
                    losses = self.objective(batch, random)
                    accelerator.backward(losses["loss"])
                terms = losses.keys()
                for name, value in losses.items():
                    meter.add(name, value)
            self._update()
            if terms != counted_terms:  # at first, and when another network joins in
                with meter.paused():
                    self._count_flops({name: value[:1] for name, value in batch.items()}, first_image)
                counted_terms = terms
            self.step += 1
            self.images_seen += batch_size * accumulation * world_size
            progress.update()

            checkpoint = self.step % args.checkpointing_steps == 0 or self.step == max_steps
            if self.step % args.logging_steps == 0 or checkpoint:  # no interval reaches over a checkpoint
                progress.set_postfix(self._log_interval())
            if validate and (self.step % args.validation_steps == 0 or self.step == max_steps):
                results = self._validate(validate)
            if checkpoint and not args.dry_run:  # after the validation: what a checkpoint follows is in the log
                with meter.paused():
                    self._save_checkpoint()
        progress.close()

        if validate and results is None:  # a finished run, resumed: its log is complete
            results = self._validate(validate, log=False)
        self._report_damage()
        if save and not args.dry_run:
            with self.ema_weights():
                if accelerator.is_fsdp2:
                    remove_sharding(self.module)
                if self.is_main:
                    save()
            self.print(f"saved to {self.output_dir}")
            accelerator.wait_for_everyone()
        accelerator.end_training()
        # After the others have gone: nobody waits for an upload.
        if save and self.is_main and self.config and not args.dry_run:
            publish(args, training_run(self.config, self.step, self.images_seen, results, data, accelerator))
        return results

    @contextlib.contextmanager
    def ema_weights(self):
        """Within this context the model has its averaged weights (its own where `ema_decay` is 0)."""
        if self.ema is None:
            yield
            return
        trained = [p.detach().clone() for p in self.averaged]
        self.ema.copy_to(self.averaged)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.averaged, trained, strict=True):
                    parameter.copy_(value)

    def _prepare(self, objective):
        """Optimiser, schedule, wrapping for the devices, EMA, resume: in this order."""
        args, accelerator = self.args, self.accelerator
        self.module = objective.train()
        groups = []
        for group in objective.parameter_groups():
            rate = group.get("learning_rate")
            rate = args.learning_rate if rate is None else rate
            groups.append({"params": group["params"], "name": group.get("name", ""), "lr": rate})
        count = sum(p.numel() for group in groups for p in group["params"])
        betas = (args.adam_beta1, args.adam_beta2)
        # The fused AdamW looks at `found_inf` on the device: a step is skipped without waiting for the device.
        optimizer = torch.optim.AdamW(groups, args.learning_rate, betas, weight_decay=args.weight_decay, fused=True)
        name, options = {
            "constant": ("constant_with_warmup", {}),
            "cosine": ("cosine_with_min_lr", {"min_lr_rate": args.min_learning_rate / (args.learning_rate or 1)}),
        }[args.lr_scheduler]
        schedule = get_scheduler(
            name, optimizer, args.lr_warmup_steps, args.max_train_steps, scheduler_specific_kwargs=options
        )
        self.learning_rate_at = schedule.lr_lambdas[0]  # a function of the step: nothing to keep in a checkpoint
        if args.compile:
            objective.compile()
        if accelerator.is_fsdp2:
            plugin = accelerator.state.fsdp_plugin
            plugin.cpu_ram_efficient_loading = False  # every process has built the whole model, buffers included
            plugin.mixed_precision_policy = None  # autocast decides what runs in low precision, as everywhere else
        elif accelerator.ddp_handler is not None:
            accelerator.ddp_handler.find_unused_parameters = len(groups) > 1  # one network may rest for some steps
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.averaged = self.optimizer.param_groups[0]["params"]
        self.nonfinite_row, self.nonfinite_total = torch.zeros(2, device=self.device).unbind()
        self.ema = None
        if args.ema_decay:
            # torch cannot copy lists of sharded tensors at once.
            self.ema = EMAModel(self.averaged, decay=args.ema_decay, foreach=not accelerator.is_fsdp2)
            self.ema.to(dtype=torch.float32)

        if self.resume_from:
            state = json.loads((self.resume_from / "state.json").read_text())
            self._check_signature(state["data"])
            load_tensors(self.resume_from, self.module, self.optimizer.optimizer, self._averages())
            self.step, self.images_seen = state["step"], state["images_seen"]
            self.nonfinite_row += state["nonfinite_row"]
            self.nonfinite_total += state["nonfinite_total"]
            self.damage.load(state["damage"])
            if self.ema is not None:
                self.ema.optimization_step = self.step
            if (accelerator.scaler is None) != (state["loss_scaler"] is None):
                raise ValueError(
                    f"mixed_precision must be as before, fp16 or not, got {args.mixed_precision!r}: the loss scale in "
                    f"{str(self.resume_from)!r} is {state['loss_scaler']}"
                )
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(state["loss_scaler"])
            self.print(f"resumed from {self.resume_from} after {self.images_seen:,} images")
        if self.is_main and not args.dry_run:
            remove_later(self.output_dir, self.step)
            self._truncate_log()
            if self.config:
                atomic_write(self.output_dir / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
        self.flops_per_image = self.peak_flops = None
        self.print(f"training {count:,} parameters of {type(objective.model).__name__} on {self.device}")

    def _check_signature(self, before):
        now = self.data_signature
        changed = [name for name in before | now if before.get(name) != now.get(name)]
        if changed:
            raise ValueError(
                f"the data must come in the order of {str(self.resume_from)!r}, but "
                + ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in changed)
            )

    def _averages(self):
        """The averaged weights by the names of their parameters."""
        if self.ema is None:
            return None
        names = {p: name for name, p in self.module.named_parameters()}
        return {names[p]: shadow for p, shadow in zip(self.averaged, self.ema.shadow_params, strict=True)}

    def _to_device(self, value):
        return value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    def _count_flops(self, batch, first_image):
        """Count the operations of a forward and a backward pass for one image, in passes that leave no trace.

        Under the counter results differ in the last bit, so it cannot be a pass of the training itself. What gradient
        checkpointing computes a second time does not count.
        """
        model = self.module.model
        if self.args.gradient_checkpointing:
            model.disable_gradient_checkpointing()
        random = ImageRandom(self.args.seed, first_image, self.device)
        buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), FlopMeter() as counter:
            self.accelerator.backward(self.objective(batch, random)["loss"])
        self.optimizer.optimizer.zero_grad()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        if self.args.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.flops_per_image = counter.flops
        if self.peak_flops is None:
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.args.mixed_precision, torch.float32)
            self.peak_flops = matmul_peak(self.device, dtype) * self.accelerator.num_processes

    def _set_learning_rate(self):
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.learning_rate_at(self.step)

    def _update(self):
        """One optimiser step, or none where a gradient is not finite: decided on the device."""
        self.accelerator.unscale_gradients()
        bad = torch.zeros((), device=self.device)
        for group in self.optimizer.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if not gradients:
                continue
            norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            torch.nn.utils.clip_grads_with_norm_(group["params"], self.args.max_grad_norm or math.inf, norm)
            bad = torch.maximum(bad, (~torch.isfinite(norm)).float())
            self.meter.add(name_of(group, "grad_norm"), norm)
        if self.accelerator.scaler is None:  # fp16's loss scaler does this itself
            self.optimizer.optimizer.found_inf = bad
        self._set_learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.averaged)
        self.nonfinite_row = (self.nonfinite_row + bad) * bad
        self.nonfinite_total = self.nonfinite_total + bad

    def _log_interval(self):
        """The only place where the host waits for the device: means since the last log, to log and progress bar."""
        means = self.meter.means(lambda table: self.accelerator.reduce(table, "sum"))
        row = int(self.nonfinite_row.item())
        speed = self.meter.speed(self.images_seen)
        rate = speed["images_per_second"]
        self.damage.add(gather_object(self.new_damage))  # every process has the report of all
        self.new_damage = []
        damaged = sum(self.damage.counts().values())
        self._log(
            {
                **means,
                **{name_of(group, "learning_rate"): group["lr"] for group in self.optimizer.param_groups},
                "skipped_steps": int(self.nonfinite_total.item()),
                **({"damaged_rows": damaged} if damaged else {}),
                **{name: round(value, 4) for name, value in speed.items()},
                "flop_share": round(self.flops_per_image * rate / self.peak_flops, 4),
                "peak_memory_gib": round(peak_memory(self.device), 3),
            }
        )
        if row >= self.args.max_nonfinite_steps:
            raise FloatingPointError(
                f"the gradient was not finite in {row} steps in a row up to step {self.step} (max_nonfinite_steps="
                f"{self.args.max_nonfinite_steps}); the weights are those before them: lower learning_rate, or train "
                f"with mixed_precision='no' instead of {self.args.mixed_precision!r}"
            )
        self.damage.check(self.images_seen, self.args.max_damaged_share, self.num_rows)
        self.meter.start(self.images_seen)
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
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line + "\n" for line in lines if json.loads(line)["step"] <= self.step]
            atomic_write(path, "".join(kept))

    def _validate(self, validate, log=True):
        with self.meter.paused():
            self.module.eval()
            torch.manual_seed(self.args.seed)
            with self.ema_weights(), self._unsharded_root(), torch.no_grad(), self.accelerator.autocast():
                results = validate(self.step)
            self.module.train()
            numbers = {f"validation/{k}": float(v) for k, v in results.items() if isinstance(v, (int, float))}
            if numbers and log:
                self._log(numbers)
                self.print(f"step {self.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in numbers.items()))
            pictures = {k: v for k, v in results.items() if hasattr(v, "save")}
            if pictures and log and self.is_main and not self.args.dry_run:
                self._save_pictures(pictures)
        return results

    @contextlib.contextmanager
    def _unsharded_root(self):
        """FSDP2 gathers the parameters outside of its blocks in the objective's forward, which validation bypasses."""
        if not self.accelerator.is_fsdp2:
            yield
            return
        self.module.unshard()
        try:
            yield
        finally:
            self.module.reshard()

    def _save_pictures(self, pictures):
        folder = self.output_dir / "validation"
        folder.mkdir(exist_ok=True)
        for name, picture in pictures.items():
            picture.save(folder / f"{name}-{self.step:07d}.png")
            for tracker in self.accelerator.trackers:
                if tracker.name == "trackio":
                    import trackio

                    tracker.log({name: trackio.Image(picture)}, step=self.step)
                else:
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({name: np.asarray(picture)[None]}, step=self.step, **layout)

    def _report_damage(self):
        """Tell at the end which rows could not be used, by kind."""
        counts = self.damage.counts()
        if counts:
            self.print("damaged rows were replaced: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))
            if self.is_main and not self.args.dry_run:
                atomic_write(self.output_dir / "damaged_rows.json", json.dumps(self.damage.state(), indent=1))

    def _save_checkpoint(self):
        partial = self.output_dir / f".checkpoint-{self.step}"
        if self.is_main:
            partial.mkdir()
        optimizer = self.optimizer.optimizer
        save_tensors(partial, self.module, optimizer, self._averages(), self.is_main)  # on every process
        if self.is_main:
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "images_seen": self.images_seen,
                "nonfinite_row": self.nonfinite_row.item(),
                "nonfinite_total": self.nonfinite_total.item(),
                "data": self.data_signature,
                "loss_scaler": scaler.state_dict() if scaler is not None else None,
                "damage": self.damage.state(),
            }
            (partial / "state.json").write_text(json.dumps(state))
            commit_checkpoint(partial, self.args.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()
