"""Draw the pictures in the folder of a run: learning curves, and validation images with their boxes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from raydetr.evaluation import stored
from raydetr.evaluation.results import Results
from raydetr.shards.images import ImageError, decode_image
from raydetr.shards.reader import ShardError, Shards
from raydetr.store.folders import Folder, write_file
from raydetr.tracking.description import CURVES, PREDICTIONS
from raydetr.tracking.events import Metrics
from raydetr.visualization.boxes import AnnotatedImage, coco_boxes, draw_grid
from raydetr.visualization.curves import learning_curves

NUM_IMAGES = 8  # in predictions.png
SCORE_THRESHOLD = 0.3  # of the boxes that are drawn


def write_pictures(
    run: Folder, metrics: Metrics, shards: Shards, evaluation: Folder, num_ranks: int
) -> str | None:
    """Write the learning curves, and a grid of validation images with their true and predicted boxes.

    Args:
        run: folder of the run.
        metrics: of the run.
        shards: of the validation split.
        evaluation: folder with the arrays of the evaluation.
        num_ranks: that wrote them.

    Returns:
        Why pictures are missing; None if none is. Pictures must not end a run.
    """
    draw: dict[str, Callable[[Path], None]] = {
        PREDICTIONS: lambda path: _draw_predictions(path, shards, evaluation, num_ranks),
        CURVES: lambda path: _draw_curves(path, metrics),
    }
    problems = [_write(run / name, draw[name]) for name in draw]
    return "; ".join(problem for problem in problems if problem is not None) or None


def _write(stored_path: Folder, draw: Callable[[Path], None]) -> str | None:
    try:
        stored_path.unlink(missing_ok=True)  # an older one would be taken for this one
        with TemporaryDirectory(prefix="raydetr-") as temporary:
            path = Path(temporary) / stored_path.name
            draw(path)
            write_file(stored_path, path.read_bytes())
    except Exception as error:  # whatever it is
        return f"no {stored_path.name} of this evaluation: {type(error).__name__}: {error}"
    return None


def _draw_curves(path: Path, metrics: Metrics) -> None:
    learning_curves(
        losses=metrics.curves("loss", "step"),
        rates=metrics.curves("lr/", "step"),
        precision=metrics.curves("AP", "epoch"),
    ).savefig(path)


def _draw_predictions(path: Path, shards: Shards, evaluation: Folder, num_ranks: int) -> None:
    number = min(NUM_IMAGES, shards.num_samples)
    indices = [i * shards.num_samples // number for i in range(number)]  # spread evenly over the split
    image_ids = [int(shards.samples["image_id"][index]) for index in indices]
    results = stored.read_arrays(evaluation, num_ranks, image_ids).results()
    images = _annotated_images(shards, indices, results)
    draw_grid(images, score_threshold=SCORE_THRESHOLD).save(path)


def _annotated_images(shards: Shards, indices: list[int], results: Results) -> list[AnnotatedImage]:
    """Read images, with their true and predicted boxes."""
    names = {category["id"]: category["name"] for category in shards.manifest.categories}
    images = []
    for index in indices:
        try:
            sample = shards.read(index)
            image = decode_image(sample.image)
        except (ShardError, ImageError):  # the evaluation has reported it
            continue
        images.append(
            AnnotatedImage(
                title=str(sample.record["file_name"]),
                image=image,
                true=coco_boxes([a for a in sample.annotations if not a.get("iscrowd")], names),
                predicted=coco_boxes(results.of_image(sample.record["id"]).to_coco(), names, SCORE_THRESHOLD),
            )
        )
    return images
