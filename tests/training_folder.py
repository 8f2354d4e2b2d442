"""A folder with recipes and images of two colours, for tests that train from the command line."""

import numpy as np
from PIL import Image

TRUNK = """
width = 32
depth = 6
patch = 4
image_size = [24, 24]
"""

RECIPE = """
stage = "{stage}"
[model]
{trunk}
{model}
[data]
workers = 0
[schedule]
base_lr = 0.3
[training]
length = "4 steps"
batch_size = 4
save_every = "2 steps"
log_every = 1
keep = 9
"""


def paint(folder, colors, count=6):
    for name, color in colors.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            noise = np.random.default_rng(i).integers(0, 40, (28, 32, 3))
            Image.fromarray((noise + color).astype(np.uint8)).save(folder / name / f"{i}.png")


def furnish(folder):
    """Recipes and images to train on and to evaluate on."""
    pretraining = "cluster = [2, 2]\ndecoder_width = 16\ndecoder_depth = 1\ndecoder_heads = 2"
    (folder / "pre.toml").write_text(RECIPE.format(stage="pretrain", trunk=TRUNK, model=pretraining))
    (folder / "fine.toml").write_text(RECIPE.format(stage="finetune", trunk=TRUNK, model="directions = 2"))
    paint(folder / "train", {"dark": 0, "light": 200})
    paint(folder / "val", {"dark": 10, "light": 190}, count=2)
