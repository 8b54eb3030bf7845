"""The command line's `raydetr shards`: everything that is done with shards but training on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raydetr.progress_bar import progress_bar

shards_app = typer.Typer(help="Write WebDataset shards.", no_args_is_help=True)


@shards_app.command("write")
def shards_write(
    images: Annotated[Path, typer.Option(help="The folder that holds the images.")],
    annotations: Annotated[Path, typer.Option(help="The COCO JSON file with their annotations.")],
    out: Annotated[Path, typer.Option(help="The folder to write; must be empty or new.")],
) -> None:
    """Check a COCO data set and write it as WebDataset shards with an index and a manifest."""
    from raydetr.data.shards import write_shards

    with progress_bar("images") as progress:
        manifest = write_shards(images, annotations, out, progress=progress)
    typer.echo(
        f"wrote {out}: {manifest.num_samples} images, {len(manifest.shards)} shards, "
        f"{len(manifest.categories)} classes, fingerprint {manifest.fingerprint[:12]}"
    )
    for notice in manifest.notices:
        typer.echo(f"note: {notice}")
