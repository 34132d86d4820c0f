"""The optimisation of a run: AdamW or Muon, its schedule, clipping, a guard against non-finite gradients, and EMA."""

import contextlib
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from transformers import get_scheduler

from ..objectives.base import Objective
from .arguments import LoopArguments
from .muon import MuonWithAdamW
from .state import load_tensors, save_tensors


__all__ = ["Optimization"]


class Optimization:
    """Prepares an objective for the devices of the run, and updates its parameters.

    Args:
        args: see `LoopArguments`.
        accelerator: of the run.
        objective: see `Objective`; its parameters with `requires_grad` are trained.

    Attributes:
        module, objective: the objective itself, and wrapped for the devices.
        num_parameters: number of trained parameters.
    """

    def __init__(self, args: LoopArguments, accelerator: Accelerator, objective: Objective):
        self.args, self.accelerator, self.module = args, accelerator, objective.train()
        groups = _parameter_groups(objective, args.learning_rate)
        self.num_parameters = sum(p.numel() for group in groups for p in group["params"])
        betas = (args.adam_beta1, args.adam_beta2)
        # The fused AdamW reads `found_inf` on the device: a step is skipped without synchronising with the device.
        kind = MuonWithAdamW if args.optimizer == "muon" else torch.optim.AdamW
        optimizer = kind(groups, args.learning_rate, betas, weight_decay=args.weight_decay, fused=True)
        self._learning_rate_at = _make_schedule(args, optimizer)
        if args.compile:
            objective.compile()
        if accelerator.is_fsdp2:
            plugin = accelerator.state.fsdp_plugin
            plugin.cpu_ram_efficient_loading = False  # every process has built the whole model, buffers included
            plugin.mixed_precision_policy = None  # autocast decides what runs in low precision, as everywhere else
        elif accelerator.ddp_handler is not None:
            # A discriminator may be unused in the first steps.
            accelerator.ddp_handler.find_unused_parameters = len(groups) > 1
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self._averaged = self.optimizer.param_groups[0]["params"]
        self._nonfinite_row, self._nonfinite_total = torch.zeros(2, device=accelerator.device).unbind()
        self._ema = None
        if args.ema_decay:
            # torch cannot copy lists of sharded tensors at once.
            self._ema = EMAModel(self._averaged, decay=args.ema_decay, foreach=not accelerator.is_fsdp2)
            self._ema.to(dtype=torch.float32)

    def update(self, step: int) -> dict[str, torch.Tensor]:
        """One optimiser step, or none if a gradient is not finite: decided on the device.

        Returns:
            The gradient norms by name, before clipping.
        """
        self.accelerator.unscale_gradients()
        norms, nonfinite = {}, torch.zeros((), device=self.accelerator.device)
        for group in self.optimizer.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if not gradients:
                continue
            norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            torch.nn.utils.clip_grads_with_norm_(group["params"], self.args.max_grad_norm or math.inf, norm)
            nonfinite = torch.maximum(nonfinite, (~torch.isfinite(norm)).float())
            norms[_name_in_log(group, "grad_norm")] = norm
        if self.accelerator.scaler is None:  # fp16's loss scaler skips such steps itself
            self.optimizer.optimizer.found_inf = nonfinite
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._learning_rate_at(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._ema is not None:
            self._ema.step(self._averaged)
        self._nonfinite_row = (self._nonfinite_row + nonfinite) * nonfinite
        self._nonfinite_total = self._nonfinite_total + nonfinite
        return norms

    def learning_rates(self) -> dict[str, float]:
        """The learning rates of the last step by name."""
        return {_name_in_log(group, "learning_rate"): group["lr"] for group in self.optimizer.param_groups}

    def skipped_steps(self) -> tuple[int, int]:
        """How many steps were skipped as not finite: in a row until now, and in total; waits for the device."""
        return int(self._nonfinite_row.item()), int(self._nonfinite_total.item())

    @contextlib.contextmanager
    def averaged_weights(self):
        """Within this context the model has its averaged weights (its own if `ema_decay` is 0)."""
        if self._ema is None:
            yield
            return
        trained = [p.detach().clone() for p in self._averaged]
        self._ema.copy_to(self._averaged)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._averaged, trained, strict=True):
                    parameter.copy_(value)

    @contextlib.contextmanager
    def unsharded_root(self):
        """FSDP2 gathers the parameters outside of its blocks in the objective's forward, which validation bypasses."""
        if not self.accelerator.is_fsdp2:
            yield
            return
        self.module.unshard()
        try:
            yield
        finally:
            self.module.reshard()

    def save(self, folder: Path) -> dict:
        """Write all tensors into `folder`, on every process.

        Returns:
            The rest of the state, as plain values.
        """
        is_main, scaler = self.accelerator.is_main_process, self.accelerator.scaler
        save_tensors(folder, self.module, self.optimizer.optimizer, self._averages(), is_main)
        row, total = self._nonfinite_row.item(), self._nonfinite_total.item()
        loss_scaler = scaler.state_dict() if scaler is not None else None
        return {"nonfinite_row": row, "nonfinite_total": total, "loss_scaler": loss_scaler}

    def load(self, folder: Path, state: dict) -> None:
        """Continue from what `save` wrote and returned; `state` also has "step".

        Raises:
            ValueError: the tensors do not fit the objective, or fp16 was used then and is not now, or vice versa.
        """
        load_tensors(folder, self.module, self.optimizer.optimizer, self._averages())
        self._nonfinite_row += state["nonfinite_row"]
        self._nonfinite_total += state["nonfinite_total"]
        if self._ema is not None:
            self._ema.optimization_step = state["step"]
        scaler = self.accelerator.scaler
        if (scaler is None) != (state["loss_scaler"] is None):
            raise ValueError(
                f"mixed_precision must be as before, fp16 or not, got {self.args.mixed_precision!r}: the loss scale "
                f"in {str(folder)!r} is {state['loss_scaler']}"
            )
        if scaler is not None:
            scaler.load_state_dict(state["loss_scaler"])

    def _averages(self):
        """The averaged weights by the names of their parameters."""
        if self._ema is None:
            return None
        names = {p: name for name, p in self.module.named_parameters()}
        return {names[p]: shadow for p, shadow in zip(self._averaged, self._ema.shadow_params, strict=True)}


def _parameter_groups(objective, learning_rate):
    groups = []
    for group in objective.parameter_groups():
        rate = group.get("learning_rate")
        rate = learning_rate if rate is None else rate
        groups.append({"params": group["params"], "name": group.get("name", ""), "lr": rate})
    return groups


def _make_schedule(args, optimizer):
    """The factor on the learning rate as a function of the step: nothing to keep in a checkpoint."""
    name, options = {
        "constant": ("constant_with_warmup", {}),
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": args.min_learning_rate / (args.learning_rate or 1)}),
    }[args.lr_scheduler]
    schedule = get_scheduler(
        name, optimizer, args.lr_warmup_steps, args.max_train_steps, scheduler_specific_kwargs=options
    )
    return schedule.lr_lambdas[0]


def _name_in_log(group, value):
    """The name of a parameter group's value in the log."""
    return f"{group['name']}_{value}" if group["name"] else value
