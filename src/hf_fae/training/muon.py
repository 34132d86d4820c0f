"""Muon for matrices and AdamW for everything else, as one optimiser."""

import torch


__all__ = ["MuonWithAdamW", "moments_of"]

ADAMW_STATE, MUON_STATE = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}


class MuonWithAdamW(torch.optim.AdamW):
    """AdamW whose two-dimensional parameters are updated by torch's `Muon` (RAEv2's recipe).

    Class tables, learned tokens and output layers are matrices, too. Muon's update is scaled to the size of AdamW's
    (`match_rms_adamw`: 0.2 times the root of the longer side), so that one learning rate serves both; it has no weight
    decay. A joined projection, such as the two inputs of a SwiGLU, is one matrix here.

    Args: those of `torch.optim.AdamW`.
    """

    _muon = None

    @torch.no_grad()
    def step(self, closure=None):
        """One step. Where `found_inf` is set and not zero there is none, as in the fused AdamW."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return
        whole = [group["params"] for group in self.param_groups]
        if self._muon is None:  # not before: FSDP2 replaces parameters after the optimiser was made
            matrices = [[p for p in params if p.ndim == 2] for params in whole]
            groups = [{"params": params, "number": number} for number, params in enumerate(matrices) if params]
            self._muon = torch.optim.Muon(groups, weight_decay=0.0, adjust_lr_fn="match_rms_adamw") if groups else None
        try:
            for group in self.param_groups:
                group["params"] = [p for p in group["params"] if p.ndim != 2]
            super().step()
        finally:
            for group, params in zip(self.param_groups, whole, strict=True):
                group["params"] = params
        if self._muon is not None:
            self._muon.state = self.state  # one place for all moments: checkpoints know no other
            for group in self._muon.param_groups:
                group["lr"] = self.param_groups[group["number"]]["lr"]
            self._muon.step()


def moments_of(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> set[str]:
    """The names of what an optimiser keeps of a parameter."""
    return MUON_STATE if isinstance(optimizer, MuonWithAdamW) and parameter.ndim == 2 else ADAMW_STATE
