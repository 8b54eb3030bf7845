"""Define the commands of `raydetr`; each calls one function of the library.

Their docstrings are the help texts.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from raydetr import config as configuration
from raydetr import recipes
from raydetr.cli.arguments import LOCAL_IGNORES, ConfigFile, RecipeAndOverrides, read_config, refuse
from raydetr.cli.cluster import cluster_app
from raydetr.cli.jobs import jobs_app, submit_app
from raydetr.cli.models import explain, model
from raydetr.cli.profile import profile
from raydetr.cli.runs import compare, list_runs, watch
from raydetr.cli.shards import shards_app
from raydetr.cli.track import exit_if_incomplete, track_app
from raydetr.cli.tune import space, tune
from raydetr.config import ConfigError
from raydetr.console import print_status, progress_bar
from raydetr.runs.signals import RunStopped

app = typer.Typer(
    help="Train detectors of the DETR family on your COCO-format data: on a laptop, or on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(shards_app, name="shards")
app.add_typer(cluster_app, name="cluster")
app.add_typer(submit_app, name="submit")
app.add_typer(jobs_app, name="jobs")
app.add_typer(track_app, name="track")
app.command("runs")(list_runs)
app.command("watch")(watch)
app.command("compare")(compare)
app.command("profile")(profile)
app.command("tune")(tune)
app.command("space")(space)
app.command("explain")(explain)
app.command("model")(model)

Local = Annotated[bool, typer.Option("--local", help="Run in this process, without Ray: for debugging.")]


@app.command("synthetic-data")
def synthetic_data(
    out: Annotated[Path, typer.Option(help="Output folder; must be empty or new.")],
    hard: Annotated[
        bool, typer.Option(help="Harder: 5 classes, no color cue, objects of 11-60 pixels.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    num_train: Annotated[int, typer.Option(min=1, help="Number of training images.")] = 2400,
    num_val: Annotated[int, typer.Option(min=1, help="Number of validation images.")] = 500,
) -> None:
    """Generate a small COCO-format data set of drawn shapes, to try things on."""
    from raydetr.shards.synthetic import write_synthetic_data

    with progress_bar("images") as progress:
        write_synthetic_data(
            out, hard=hard, seed=seed, num_train=num_train, num_val=num_val, progress=progress
        )
    typer.echo(f"wrote {out}; next:")
    for split in ("train", "val"):
        annotations = str(out / f"annotations/instances_{split}.json")
        images, shards = str(out / split), str(out / f"shards/{split}")
        options = ["--images", images, "--annotations", annotations, "--out", shards]
        typer.echo(shlex.join(["raydetr", "shards", "write", *options]))


@app.command("recipes")
def list_recipes() -> None:
    """List the recipes, one line each."""
    width = max(len(recipe.__name__) for recipe in recipes.RECIPES)
    for recipe in recipes.RECIPES:
        typer.echo(f"{recipe.__name__:{width}}  {recipes.summary(recipe)}")


@app.command("config")
def config_command(arguments: RecipeAndOverrides = None, config: ConfigFile = None) -> None:
    """Print a resolved configuration as YAML; `--config FILE` of the other commands reads it."""
    typer.echo(configuration.to_yaml(read_config(arguments or [], config)), nl=False)


@app.command()
def train(
    arguments: RecipeAndOverrides = None,
    config: ConfigFile = None,
    resume: Annotated[
        str | None, typer.Option(help="Resume the run in this folder, or at this URL; overrides may follow.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run, and of its folder; default: a new one.")
    ] = None,
    or_resume: Annotated[
        bool,
        typer.Option(
            "--or-resume", help="Resume the run --name if it exists, as a job that is submitted again does."
        ),
    ] = False,
    schedule: Annotated[
        Path | None,
        typer.Option(help="Overrides by epoch, from a population (`schedule.yaml`), or your own."),
    ] = None,
    local: Local = False,
) -> None:
    """Train a detector on Ray Train workers, evaluate it, and log everything to MLflow."""
    from raydetr.runs import run
    from raydetr.runs.schedule import SCHEDULE, read_schedule, resume_schedule, train_schedule
    from raydetr.store.folders import open_folder

    if local:
        refuse(arguments or [], LOCAL_IGNORES, "with --local")
    if or_resume and name is None:
        raise ConfigError("--or-resume needs the name of the run: add --name NAME")
    if resume is not None and schedule is not None:
        raise ConfigError("--schedule continues with --name NAME --or-resume: omit --resume")
    if schedule is not None:
        chosen = read_config(arguments or [], config)
        steps = read_schedule(schedule, chosen)
        result = train_schedule(chosen, steps, local=local, name=name, or_resume=or_resume)
    elif resume is None:
        chosen = read_config(arguments or [], config)
        result = run.start(chosen, local=local, name=name, or_resume=or_resume)
    elif name is not None:
        raise ConfigError("--resume continues the run in its folder: omit --name")
    elif config is not None:
        raise ConfigError("--resume takes the run's own configuration: omit --config")
    elif (open_folder(resume) / SCHEDULE).exists():
        if arguments:
            raise ConfigError(f"{resume} has a schedule, which decides its settings: omit {arguments[0]}")
        result = resume_schedule(open_folder(resume), local=local)
    else:
        overrides = configuration.parse_assignments(arguments or [])
        result = run.resume(resume, overrides=overrides, local=local)
    typer.echo(result.to_text())
    exit_if_incomplete(result.pending_upload)


@app.command()
def evaluate(
    checkpoint: Annotated[
        str | None, typer.Argument(help="A run or a checkpoint: its folder or URL.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH=VALUE", help="Overrides, such as cluster.num_workers=1."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Shards; default: the run's validation split. With --results also a COCO annotation file."
        ),
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="COCO results of any tool (JSON), instead of a checkpoint.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder with the images of a COCO annotation file, for --html and --report."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Explain the evaluation in a page: errors, classes, images.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Folder, empty or new, for the page, its numbers as JSON, its plots and images."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the AP table to this JSON file.")] = None,
    local: Local = False,
) -> None:
    """Evaluate a checkpoint, or the results of another tool: COCO metrics, AP per class, a page that explains them."""
    from raydetr.cli import evaluate as command

    if local:
        refuse(overrides or [], ("cluster.num_workers", "cluster.address"), "with --local")
    options = command.Options(data, results, images, html, report, out, local)
    typer.echo(command.run(checkpoint, overrides or [], options))


@app.command()
def predict(
    checkpoint: Annotated[str, typer.Argument(help="A run or a checkpoint: its folder or URL.")],
    images: Annotated[list[Path], typer.Argument(help="Image files and folders of images.")],
    out: Annotated[Path, typer.Option(help="Output folder; must be empty or new.")],
    score_threshold: Annotated[float, typer.Option(help="Draw boxes with at least this score.")] = 0.3,
    recursive: Annotated[bool, typer.Option("--recursive", help="Search subfolders too.")] = False,
) -> None:
    """Detect objects in images; write images with boxes and a COCO-format results JSON."""
    from raydetr.inference.predict import predict as run_prediction

    with progress_bar("images") as progress:
        predicted = run_prediction(
            checkpoint, images, out, recursive=recursive, score_threshold=score_threshold, progress=progress
        )
    for note in predicted.notes:
        print_status(f"note: {note}")
    typer.echo(f"wrote {out}")
    if predicted.failed:
        lines = "".join(f"\n  {line}" for line in predicted.failed)
        print_status(f"error: {len(predicted.failed)} files cannot be read:{lines}")
        raise typer.Exit(1)


@app.command("import-checkpoint")
def import_checkpoint(
    file: Annotated[Path, typer.Argument(help="Official checkpoint (.pth).")],
    model: Annotated[str, typer.Option(help="Recipe, with or without its epochs, or architecture.")],
    out: Annotated[
        Path | None, typer.Option(help="Output folder, empty or new; default: the file's name.")
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="COCO JSON file with its categories; default: COCO's.")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the EMA weights of the file (ema_model).")] = False,
) -> None:
    """Convert an official checkpoint to evaluate it, predict with it, or fine-tune it."""
    from raydetr.training.import_checkpoint import import_checkpoint as run_import

    out = out or Path(file.stem)
    found = run_import(file, model, out, annotations, ema=ema)
    for note in found.notes:
        typer.echo(f"note: {note}")
    typer.echo(
        f"{file}: a checkpoint of {found.architecture}, {found.num_parameters:,} parameters, "
        f"{found.num_classes} classes\nwrote {out}, with the settings of {found.recipe}\n"
        f"next: raydetr evaluate {out} --data SHARDS, or raydetr train RECIPE init.checkpoint={out}"
    )


@app.command()
def overfit(
    arguments: RecipeAndOverrides = None,
    config: ConfigFile = None,
    data: Annotated[
        str | None, typer.Option(help="Folder of shards, or its URL; default: the recipe's.")
    ] = None,
    images: Annotated[int, typer.Option(help="Number of images to overfit.")] = 8,
    steps: Annotated[int, typer.Option(help="Number of optimizer steps.")] = 300,
    long_side: Annotated[int, typer.Option(help="Long side of the images, in pixels.")] = 256,
    out: Annotated[Path, typer.Option(help="Folder for overfit.json and the image grid.")] = Path("build"),
) -> None:
    """Overfit a few images and evaluate on the same ones, to check data and set-up."""
    from raydetr.runs.overfit import OVERFIT_DECIDES
    from raydetr.runs.overfit import overfit as run_overfit

    refuse(arguments or [], OVERFIT_DECIDES, "on overfitting, which sets it")
    chosen = read_config(arguments or [], config)
    outcome = run_overfit(chosen, data, num_images=images, num_steps=steps, long_side=long_side, out=out)
    typer.echo(outcome.to_text())


@app.command()
def doctor(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA",
            help="Shards, the training split first; without any, examine this machine.",
        ),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe that the data is for.")] = None,
    config: ConfigFile = None,
    short_side: Annotated[
        int | None,
        typer.Option(min=1, help="Judge small objects after a resize to this short side, in pixels."),
    ] = None,
    max_side: Annotated[int | None, typer.Option(min=1, help="Limit of the long side, in pixels.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result to this JSON file.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the result as a page with images.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that read; default: one per core.")
    ] = None,
) -> None:
    """Examine data, or this machine, before training; exit code 1 means that training must not start."""
    from raydetr.cli import doctor as command

    options = command.Options(recipe, config, short_side, max_side, json_file, html, workers)
    text, may_start = command.run(data or [], options)
    typer.echo(text)
    raise typer.Exit(0 if may_start else 1)


def main() -> None:
    """Run the command line; print a user's mistake as one line, without a traceback."""
    # The shell does not expand the ~ of --out=~/runs
    arguments = [re.sub("^(--[a-z-]+=)?~/", rf"\g<1>{Path.home()}/", argument) for argument in sys.argv[1:]]
    try:
        app(arguments)
    except RunStopped as stopped:
        print_status(str(stopped))
        sys.exit(stopped.code)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        if not _is_meant_for_users(error):
            raise
        print_status(f"error: {error}")
        sys.exit(1)


def _is_meant_for_users(error: Exception) -> bool:
    """Return whether this project's own code raised the error. One from inside a library is a bug."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.split(".")[0] in ("raydetr", "detrs")
