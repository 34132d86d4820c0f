"""Train in a child process and kill it, again and again, until it gets through. Run by training/test_kills.py.

python killed_run.py FOLDER DATA KILLS MODE

MODE is "indexed", "streaming", or "captions": text to image on streamed WebDataset files with captions in their JSON.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

import torch
from factories import tiny_fae, tiny_mmdit, tiny_text_encoder
from killing import kill_repeatedly, wait_until
from torch import nn

from hf_fae.data.captions import CaptionEncoder
from hf_fae.data.conditions import TextCondition
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.objectives.base import Objective
from hf_fae.objectives.flow_matching import FlowMatchingObjective
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.loop import TrainingLoop


def note(path, batch, random):
    line = json.dumps([random.first_image, batch["row_ids"].tolist()]) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line.encode())  # one call: a kill leaves all of the line or nothing
    os.close(file)


class CaptionLedger(FlowMatchingObjective):
    """The objective of text to image, which writes down the same."""

    def __init__(self, path):
        model, (text_encoder, tokenizer) = tiny_mmdit(), tiny_text_encoder()
        captions = CaptionEncoder(tokenizer, text_encoder, model.config.max_caption_length)
        super().__init__(model, tiny_fae(), 0.4, condition=TextCondition(model, captions))
        self.path = path

    def forward(self, batch, random):
        note(self.path, batch, random)
        return super().forward(batch, random)


class Ledger(Objective):
    """Learns something, and writes down which rows it has seen as which images of the run."""

    def __init__(self, path):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2048), nn.SiLU(), nn.Linear(2048, 1024))
        super().__init__(model, [model])
        self.path = path

    def forward(self, batch, random):
        note(self.path, batch, random)
        images = nn.functional.adaptive_avg_pool2d(batch["pixel_values"], 8)
        output = self.model(images + 0.1 * random.normal(*images.shape))
        return {"loss": (output - batch["row_ids"][:, None]).square().mean()}


def train(folder, dataset, mode):
    args = LoopArguments(
        output_dir=str(folder),
        max_train_steps=80 if mode == "captions" else 240,
        train_batch_size=4,
        learning_rate=1e-3,
        ema_decay=0.9,
        logging_steps=5,
        checkpointing_steps=2,  # so that some kills hit one that is being written
        validation_steps=10,
        checkpoints_total_limit=2,
        resume_from_checkpoint="latest",
        report_to="none",
    )
    columns = {"image_column": "jpg", "caption_column": "json.caption"} if mode == "captions" else {}
    streaming = mode != "indexed"
    data = ImageData(DataArguments(dataset, resolution=32, streaming=streaming, shuffle_block=8, **columns), args.seed)
    loop = TrainingLoop(args)
    objective = (CaptionLedger if mode == "captions" else Ledger)(folder.with_suffix(".ledger"))
    first = next(objective.model.parameters())
    loop.run(objective, data, validate=lambda step: {"norm": first.norm().item()})


def count_lines(path):
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def main(folder, dataset, kills, mode):
    """Kill at random moments and while a checkpoint is written; prints how often that left a half-written one."""
    chance, ledger = random.Random(0), folder.with_suffix(".ledger")

    def is_writing():
        return any(folder.glob(".checkpoint-*"))

    def wait(number):
        lines = count_lines(ledger) + chance.randint(1, 8)  # a kill during the start would prove nothing
        wait_until(lambda: count_lines(ledger) >= lines)
        if number % 2:
            time.sleep(chance.uniform(0, 0.5))
        else:
            wait_until(is_writing)

    print(kill_repeatedly(kills, lambda: train(folder, dataset, mode), wait, is_writing))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
