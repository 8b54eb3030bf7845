"""Define the commands of `raydetr shards`: write, check, describe, index and show shards."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from raydetr.console import progress_bar
from raydetr.locations import check_location, is_remote, local_folder
from raydetr.store.output_folder import check_out_file

if TYPE_CHECKING:
    from raydetr.shards.manifest import Manifest
    from raydetr.shards.source import Source

shards_app = typer.Typer(help="Write, check, describe and show WebDataset shards.", no_args_is_help=True)


Workers = Annotated[int | None, typer.Option(min=1, help="Processes; default: one per core.")]


@shards_app.command("write")
def shards_write(
    out: Annotated[str, typer.Option(help="Output folder: empty, new, or that of an interrupted run.")],
    images: Annotated[Path | None, typer.Option(help="COCO: folder of the images.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="COCO: JSON file of the annotations.")] = None,
    yolo: Annotated[Path | None, typer.Option(help="YOLO: data.yaml.")] = None,
    voc: Annotated[Path | None, typer.Option(help="Pascal VOC: folder that holds ImageSets.")] = None,
    split: Annotated[str | None, typer.Option(help="YOLO or VOC: train, val, ...")] = None,
    zero_based: Annotated[
        bool, typer.Option("--zero-based", help="VOC: box coordinates count from 0.")
    ] = False,
    webdataset: Annotated[
        str | None, typer.Option(help="WebDataset: folder of tars, or a pattern such as 'a-{000..009}.tar'.")
    ] = None,
    categories: Annotated[
        Path | None, typer.Option(help="WebDataset: JSON file of the categories, such as a COCO file.")
    ] = None,
    boxes: Annotated[
        Literal["xywh", "xyxy"] | None, typer.Option(help="WebDataset: format of the boxes; COCO's is xywh.")
    ] = None,
    on_corrupt: Annotated[
        Literal["raise", "skip"], typer.Option(help="skip: omit and list images that are missing or corrupt.")
    ] = "raise",
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Images per tar file.")] = 1000,
    workers: Workers = None,
) -> None:
    """Check a data set and write it as WebDataset shards with an index and a manifest.

    The source is COCO (--images, --annotations), YOLO (--yolo, --split), Pascal VOC (--voc, --split) or WebDataset
    shards of another program (--webdataset).
    """
    from raydetr.shards.writer import write_source

    folder = _local(out)
    source = _choose_source(
        images,
        annotations,
        yolo,
        voc,
        webdataset,
        split,
        zero_based=zero_based,
        categories=categories,
        boxes=boxes,
    )
    try:
        with progress_bar("images") as progress:
            manifest = write_source(
                source,
                folder,
                samples_per_shard=samples_per_shard,
                on_corrupt=on_corrupt,
                workers=workers or _num_cores(),
                progress=progress,
                notify=typer.echo,
            )
    except KeyboardInterrupt:
        typer.echo(
            f"stopped; finished shards are in {folder}: run the same command again to continue", err=True
        )
        raise
    typer.echo(_summary("wrote", folder, manifest))


@shards_app.command("check")
def shards_check(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Folder of shards.")], workers: Workers = None
) -> None:
    """Verify every byte: sha256 of shards, crc, records and images of samples, tars against the index."""
    from raydetr.shards.verify import check_shards

    with progress_bar("images") as progress:
        manifest = check_shards(_local(data), workers=workers or _num_cores(), progress=progress)
    typer.echo(
        f"{data}: {manifest.num_samples} images with {manifest.num_annotations} annotations in "
        f"{_num_shards(manifest)}: every byte matches the manifest"
    )


@shards_app.command("info")
def shards_info(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Folder of shards, or its URL.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the content of shards: images, annotations, categories with counts, sizes, notices."""
    from raydetr.shards.info import describe, to_text
    from raydetr.shards.reader import open_shards

    with progress_bar("images") as progress:
        info = describe(open_shards(data), progress)
    typer.echo(json.dumps(info, indent=1, allow_nan=False) if as_json else to_text(info))


@shards_app.command("export-index")
def shards_export_index(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Folder of shards.")],
    kind: Annotated[
        Literal["dali", "energon"], typer.Option("--format", help="DALI's .idx or Energon's .tar.idx.")
    ],
) -> None:
    """Write the index that NVIDIA DALI or Megatron-Energon expects beside each shard."""
    from raydetr.shards.reader import open_shards
    from raydetr.shards.tar_samples import export_indexes

    shards = open_shards(_local(data))
    paths = export_indexes(shards.path, [shard.name for shard in shards.manifest.shards], kind)
    typer.echo(f"wrote {paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else ""))


def _summary(done: str, folder: Path, manifest: Manifest) -> str:
    lines = [
        f"{done} {folder}: {manifest.num_samples} images, {_num_shards(manifest)}, "
        f"{len(manifest.categories)} classes, fingerprint {manifest.fingerprint[:12]}"
    ]
    return "\n".join([*lines, *(f"note: {notice}" for notice in manifest.notices)])


def _num_shards(manifest: Manifest) -> str:
    return "1 shard" if len(manifest.shards) == 1 else f"{len(manifest.shards)} shards"


def _local(location: str) -> Path:
    """Return the path of a local folder.

    Raises:
        ValueError: the location is remote.
    """
    location = check_location(location)
    if is_remote(location):
        raise ValueError(f"{location}: this needs a local folder: work there, and copy the shards")
    return local_folder(location)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _choose_source(
    images: Path | None,
    annotations: Path | None,
    yolo: Path | None,
    voc: Path | None,
    webdataset: str | None,
    split: str | None,
    *,
    zero_based: bool,
    categories: Path | None,
    boxes: Literal["xywh", "xyxy"] | None,
) -> Source:
    """Open the data set that the options of `raydetr shards write` name.

    Raises:
        ValueError: they name none or several, one is missing or has no effect, or the data is invalid.
    """
    from raydetr.shards.importers.voc import voc_source
    from raydetr.shards.importers.webdataset import webdataset_source
    from raydetr.shards.importers.yolo import yolo_source
    from raydetr.shards.source import coco_source

    is_coco = images is not None or annotations is not None
    if is_coco + sum(source is not None for source in (yolo, voc, webdataset)) != 1:
        raise ValueError(
            "name one data set: --images with --annotations (COCO), --yolo with --split, --voc with --split, or "
            "--webdataset"
        )
    for option, value, needed, has_effect in (
        ("--zero-based", zero_based, "--voc", voc is not None),
        ("--categories", categories, "--webdataset", webdataset is not None),
        ("--boxes", boxes, "--webdataset", webdataset is not None),
        ("--split", split, "--yolo or --voc", yolo is not None or voc is not None),
    ):
        if value and not has_effect:
            raise ValueError(f"{option} has no effect without {needed}: omit it")
    if webdataset is not None:
        with progress_bar("MiB") as progress:
            return webdataset_source(
                webdataset,
                categories=categories,
                box_format=boxes,
                progress=lambda done, total: progress(-(-done >> 20), -(-total >> 20)),
            )
    if is_coco:
        if images is None or annotations is None:
            raise ValueError("--images and --annotations need each other: give both")
        return coco_source(images, annotations)
    if split is None:
        raise ValueError("which part of the data set? give --split train, --split val, ...")
    if yolo is not None:
        return yolo_source(yolo, split)
    assert voc is not None
    return voc_source(voc, split, zero_based=zero_based)


@shards_app.command("browse")
def shards_browse(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Folder of shards, or its URL.")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH=VALUE", help="Overrides of the augmentation's recipe."),
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option(help="Show the training augmentation of a recipe, or of a configuration file."),
    ] = None,
    num: Annotated[int, typer.Option(min=1, max=1000, help="Number of images.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the images and their augmentation.")] = 0,
) -> None:
    """Write a contact sheet: images with their boxes, class names and ids."""
    from raydetr.data.contact_sheet import contact_sheet, training_transform
    from raydetr.shards.reader import open_shards

    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: the sheet is a PNG file: give it a name that ends in .png")
    check_out_file(out)
    if overrides and augment is None:
        raise ValueError(f"{overrides[0]} has no effect without --augment RECIPE")
    transform = None if augment is None else training_transform(augment, overrides or [])
    with progress_bar("images") as progress:
        sheet = contact_sheet(open_shards(data), num, seed=seed, transform=transform, progress=progress)
    sheet.save(out)
    typer.echo(f"wrote {out}: {sheet.width}x{sheet.height} pixels")
