"""What models of every class hold and compute, written down: `python tests/recorded_models.py` adds new classes.

The weights are a formula of their names, so that the record has configs, names, shapes and a few outputs only.
"""

import json
import zlib
from pathlib import Path

import torch
from model_cases import CASES, run


__all__ = ["RECORD", "compute", "formula_weights"]

RECORD = Path(__file__).with_name("recorded_models.json")


def formula_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Weights by name: waves whose phase depends on the name; standard deviations are positive."""
    weights = {}
    for name, shape in shapes.items():
        numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + zlib.crc32(name.encode()) % 1000
        values = 0.2 * torch.sin(0.7 * numbers)
        weights[name] = (values.abs() + 0.5 if name.endswith("_std") else values).float().view(shape)
    return weights


def compute(case, model) -> list[float]:
    """Eight numbers of an output; of a tokenizer on a frozen encoder, of what it decodes."""
    if hasattr(model, "image_encoder"):
        with torch.no_grad():
            output = model.decode(torch.linspace(-1, 1, model.config.latent_channels * 16).view(1, -1, 4, 4)).sample
    else:
        output = run(model, case.inputs(2))
    places = torch.linspace(0, output.numel() - 1, 8).round().long()
    return output.flatten()[places].tolist()


def describe(case) -> dict:
    """One entry of the record."""
    model = case.make()
    config = json.loads(model.to_json_string())
    shapes = {
        name: list(value.shape)
        for name, value in sorted(model.state_dict().items())
        if not name.startswith("image_encoder.")
    }
    model.load_state_dict(formula_weights(shapes), strict=False)
    config = {name: value for name, value in config.items() if name[0] != "_" or name == "_class_name"}
    return {"config": config, "tensors": shapes, "output": compute(case, model)}


if __name__ == "__main__":
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record |= {name: describe(case) for name, case in CASES.items() if name not in record}
    lines = [f"{json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}" for name, entry in record.items()]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
