"""Draw the pictures of docs/models.md: what the queries of each paper's model look at, on the quickstart's data.

    make docs-pictures                                                  # with the runs of `make race`, if there are any
    make docs-pictures ARGS="--epochs 1 --images 200 --out pictures"    # a try of the whole command

The models are those of `make race`, which trains them in 9 minutes; one that is finished is not trained again. Images
of 96 pixels have 6x6 tokens of dense attention, on which little can be seen. So the three models with dense attention
are trained for four epochs more, on images of 192 pixels, as `raydetr train RECIPE --local` does: 2 CPU minutes each.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from race import RECIPES, STORAGE, Budget, short, train

from raydetr import recipes
from raydetr.config import RunConfig, override
from raydetr.inference.explain import explain_image
from raydetr.runs import run
from raydetr.store.folders import Folder

OUT = Path("docs")
SIDE = 192  # pixels; of the images of the models with dense attention
DENSE = ("DETR", "Conditional DETR", "DAB-DETR")
IMAGES = Path("build/quickstart/coco/val")
SAMPLE = "000014.jpg"
NUM_DETECTIONS = 2
# Of the pictures that `raydetr explain` draws
KEPT = {
    "DETR": ("attention",),
    "Conditional DETR": ("heads",),
    "DAB-DETR": ("boxes", "heads"),
    "Deformable DETR": ("points",),
    "DINO": ("levels", "boxes", "proposals", "denoising", "attention_mask"),
}


def main() -> None:
    """Train what is missing, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, help="of every run; default: those of the recipes")
    parser.add_argument("--images", type=int, help="use only the first of each split")
    parser.add_argument("--storage", default=STORAGE, help="folder of the runs")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the pictures")
    arguments = parser.parse_args()
    budget = Budget(arguments.epochs, arguments.images, arguments.storage)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for model, recipe in RECIPES.items():
        config = override(recipes.find(recipe), budget.changes())
        folder = train(config, f"race-{short(recipe)}{budget.suffix}")
        if model in DENSE:
            folder = train_larger(config, folder, f"pictures-{short(recipe)}{budget.suffix}")
        draw(model, short(recipe), folder, arguments.out)


def train_larger(config: RunConfig, start: Folder, name: str) -> Folder:
    """Train on larger images, from the weights of a run; return the run's folder."""
    changes = {
        "init.checkpoint": str(start),
        "data.train_transform.short_sides": [SIDE],
        "data.val_transform.short_sides": [SIDE],
        "data.batch_size": 16,
        "cluster.num_workers": 1,
    }
    return run.start(override(config, changes), local=True, name=name, or_resume=True, warn=False).folder


def draw(model: str, name: str, folder: Folder, out: Path) -> None:
    """Write the pictures of one model, and print their captions."""
    with tempfile.TemporaryDirectory() as temporary:
        drawn = Path(temporary) / "pictures"
        for picture in explain_image(str(folder), IMAGES / SAMPLE, drawn, num_detections=NUM_DETECTIONS):
            kind = Path(picture.name).stem
            if kind in KEPT[model]:
                target = out / f"models-{name}-{kind}.jpg"
                shutil.copyfile(drawn / picture.name, target)
                with Image.open(target) as written:
                    size = f"{written.width}x{written.height}, {target.stat().st_size / 1000:.0f} kB"
                print(f"{target} ({size}): {picture.caption}")


if __name__ == "__main__":
    main()
