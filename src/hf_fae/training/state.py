"""The tensors of a run in safetensors: whole and by name, also if its parameters are sharded.

A checkpoint of many processes can be resumed by one, and vice versa.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .muon import moments_of


__all__ = ["load_tensors", "remove_sharding", "save_tensors"]


def trained_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters and persistent buffers of a module, not copies of them.

    Frozen parameters are left out: a resumed run loads them from their source again.
    """
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if name not in frozen}


def save_tensors(
    directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer, averaged: dict | None, is_main: bool
) -> None:
    """Write `model.safetensors`, `optimizer.safetensors` and, with averaged weights by name, `ema.safetensors`.

    Every process takes part in gathering sharded tensors; the main one writes.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    states = optimizer.state.items()
    tables = {
        "model": trained_tensors(module),
        "optimizer": {f"{names[p]}.{key}": value for p, values in states for key, value in values.items()},
    }
    if averaged is not None:
        tables["ema"] = averaged
    for table, tensors in tables.items():
        gathered = {}
        for name, tensor in tensors.items():
            tensor = _whole(tensor)
            if is_main:
                gathered[name] = tensor.contiguous()
        if is_main:
            save_file(gathered, directory / f"{table}.safetensors")


@torch.no_grad()
def load_tensors(directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer, averaged: dict | None) -> None:
    """Load what `save_tensors` wrote into the tensors in use.

    Raises:
        ValueError: the checkpoint has other tensors than the run.
    """
    for table, tensors in (("model", trained_tensors(module)), ("ema", averaged)):
        if tensors is None:
            continue
        found = load_file(directory / f"{table}.safetensors")
        other = sorted(name for name in found.keys() & tensors.keys() if found[name].shape != tensors[name].shape)
        missing, unexpected = sorted(tensors.keys() - found.keys()), sorted(found.keys() - tensors.keys())
        if missing or unexpected or other:
            raise ValueError(
                f"checkpoint {str(directory)!r} does not fit the objective: {table}.safetensors lacks {missing[:3]}, "
                f"has the unexpected {unexpected[:3]}, and {other[:3]} of another shape"
            )
        for name, tensor in tensors.items():
            tensor.copy_(_like(tensor, found[name]))
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    kinds = {}
    for key, value in load_file(directory / "optimizer.safetensors").items():
        name, _, kind = key.rpartition(".")
        if name not in trained:
            raise ValueError(f"checkpoint {str(directory)!r} does not fit the objective: it optimises {name!r}")
        parameter = trained[name]
        optimizer.state[parameter][kind] = _like(parameter, value) if value.ndim else value.to(parameter.device)
        kinds.setdefault(name, set()).add(kind)
    for name, found in kinds.items():
        wanted = moments_of(optimizer, trained[name])
        if found != wanted:
            raise ValueError(
                f"checkpoint {str(directory)!r} is broken, or of another optimizer: it has the moments "
                f"{sorted(found)} of {name!r} instead of {sorted(wanted)}"
            )


def remove_sharding(module: nn.Module) -> None:
    """Turn a module that FSDP2 has sharded into an ordinary one again, with whole parameters on every process.

    For the end of a run, so that the plain model is saved. FSDP2 cannot be undone by itself: it works by a subclass
    and by hooks, and our modules have no other hooks.
    """
    from torch.distributed.fsdp import FSDPModule

    owners = [(owner, name, p) for owner in module.modules() for name, p in owner.named_parameters(recurse=False)]
    wholes = [nn.Parameter(_whole(p), requires_grad=p.requires_grad) for _, _, p in owners]
    for part in module.modules():
        for hooks in (part._forward_pre_hooks, part._forward_hooks, part._state_dict_pre_hooks):
            hooks.clear()
        if isinstance(part, FSDPModule):
            part.__class__ = type(part).__mro__[2]
    for (owner, name, _), parameter in zip(owners, wholes, strict=True):
        owner.register_parameter(name, parameter)


def _whole(tensor):
    """The tensor itself, or the whole of a sharded one."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _like(tensor, value):
    """A whole value on the device of `tensor`, sharded as that is.

    Its elements lie in memory as those of `tensor`: fused optimizers pair them in that order.
    """
    if not hasattr(tensor, "full_tensor"):
        return torch.empty_like(tensor, dtype=value.dtype, requires_grad=False).copy_(value)
    value = value.to(tensor.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, tensor.device_mesh, tensor.placements)
