"""Ten drawings of one subject that no emoji shows: a turquoise monster with one eye. See docs/guides/fine-tune.md.

python experiments/emoji/lora_subject.py outputs/monster
"""

import argparse
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw


SIZE, SCALE = 256, 4  # drawn at four times the size: smooth edges
BODY, SHADE, BELLY, HORN = (46, 196, 182), (30, 150, 140), (203, 243, 240), (255, 159, 28)


def draw_monster(rng: random.Random) -> Image.Image:
    """The monster on white; place, size, tilt, gaze and mouth vary."""
    image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), "white")
    canvas = ImageDraw.Draw(image)
    unit = SIZE * SCALE * rng.uniform(0.36, 0.42)
    x, y = (SIZE * SCALE * rng.uniform(0.47, 0.53) for _ in range(2))

    def ellipse(left, top, width, height, colour):
        box = (left - width, top - height, left + width, top + height)
        canvas.ellipse([x + unit * box[0], y + unit * box[1], x + unit * box[2], y + unit * box[3]], fill=colour)

    for side in (-1, 1):
        horn = [(side * 0.62, -0.45), (side * 0.2, -0.72), (side * 0.62, -1.12)]
        canvas.polygon([(x + unit * left, y + unit * top) for left, top in horn], fill=HORN)
        ellipse(side * 0.42, 0.88, 0.27, 0.14, SHADE)
        ellipse(side * 0.86, 0.3, 0.17, 0.27, SHADE)
    ellipse(0, 0.05, 0.82, 0.86, BODY)
    ellipse(0, 0.5, 0.5, 0.36, BELLY)
    ellipse(0, -0.2, 0.42, 0.42, "white")
    angle = rng.uniform(0, 2 * math.pi)
    gaze_x, gaze_y = 0.13 * math.cos(angle), 0.13 * math.sin(angle)
    ellipse(gaze_x, -0.2 + gaze_y, 0.22, 0.22, (40, 40, 60))
    ellipse(gaze_x + 0.07, -0.27 + gaze_y, 0.07, 0.07, "white")
    ellipse(0, 0.42, 0.26, rng.uniform(0.05, 0.14), (120, 40, 60))
    image = image.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor="white")
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the images go")
    folder = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for index in range(10):
        draw_monster(rng).save(folder / f"{index}.png")
    print(f"wrote 10 images to {folder}")


if __name__ == "__main__":
    main()
