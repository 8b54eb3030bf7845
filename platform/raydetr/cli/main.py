"""The command line. Every command is a few lines over a function of the library."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from raydetr import config as configuration
from raydetr import recipes as recipe_book
from raydetr.cli.shards import shards_app
from raydetr.config import ConfigError, RunConfig
from raydetr.console import print_status, progress_bar
from raydetr.store.output_folder import check_out_file

app = typer.Typer(
    help="Train detectors of the DETR family on your COCO-format data: on a laptop, or on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(shards_app, name="shards")

RecipeAndOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE [PATH=VALUE]...",
        help="A recipe (see `raydetr recipes`), then overrides such as optim.lr=2e-4.",
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="A configuration file, instead of a recipe.")
]
Local = Annotated[bool, typer.Option("--local", help="In this process, without Ray: for debugging.")]
Data = Annotated[Path, typer.Option(help="A folder of shards.")]


@app.command("sample-data")
def sample_data(
    out: Annotated[Path, typer.Option(help="The folder to write; must be empty or new.")],
    hard: Annotated[bool, typer.Option(help="5 classes, no color cue, objects of 11-60 pixels.")] = False,
    seed: Annotated[int, typer.Option(help="Another seed gives other images.")] = 0,
    num_train: Annotated[int, typer.Option(min=1, help="Training images.")] = 2400,
    num_val: Annotated[int, typer.Option(min=1, help="Validation images.")] = 500,
) -> None:
    """Generate a small COCO-format data set of drawn shapes: something to try things on."""
    from raydetr.shards.synthetic import write_synthetic_data

    with progress_bar("images") as progress:
        write_synthetic_data(
            out, hard=hard, seed=seed, num_train=num_train, num_val=num_val, progress=progress
        )
    typer.echo(
        f"wrote {out}\nnext: raydetr shards write --images {out}/train --annotations "
        f"{out}/annotations/instances_train.json --out {out}/shards/train"
    )


@app.command()
def recipes() -> None:
    """List the recipes, one line each."""
    width = max(len(recipe.__name__) for recipe in recipe_book.RECIPES)
    for recipe in recipe_book.RECIPES:
        typer.echo(f"{recipe.__name__:{width}}  {recipe_book.summary(recipe)}")


@app.command("config")
def config_command(arguments: RecipeAndOverrides = None, config: ConfigFile = None) -> None:
    """Print a resolved configuration as YAML; `--config FILE` of the other commands reads it back."""
    typer.echo(configuration.to_yaml(read_config(arguments or [], config)), nl=False)


@app.command()
def train(
    arguments: RecipeAndOverrides = None,
    config: ConfigFile = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this folder; overrides may follow.")
    ] = None,
    local: Local = False,
) -> None:
    """Train a detector on Ray Train workers, evaluate it and log everything to MLflow."""
    from raydetr.runs import run

    if resume is None:
        result = run.start(read_config(arguments or [], config), local=local)
    elif config is not None:
        raise ConfigError("--resume takes the run's own configuration: omit --config")
    else:
        overrides = configuration.parse_assignments(arguments or [])
        result = run.resume(resume, overrides=overrides, local=local)
    typer.echo(result.to_text())


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, of a run or imported.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH=VALUE]...", help="Overrides, such as cluster.num_workers=1."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Shards; by default those the run validates on.")] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the AP table.")] = None,
    local: Local = False,
) -> None:
    """Evaluate a checkpoint: the twelve COCO numbers, and AP by class."""
    from raydetr.runs.evaluate import evaluate_checkpoint

    if out is not None:
        check_out_file(out)
    assignments = configuration.parse_assignments(overrides or [])
    if data is not None and assignments.setdefault("data.val", data) != data:
        raise ConfigError(f"--data {data} and data.val={assignments['data.val']} are given: keep one")
    table = evaluate_checkpoint(checkpoint, assignments, local=local)
    typer.echo(table.to_text())
    if out is not None:
        out.write_text(json.dumps(table.to_dict(), indent=1))


@app.command()
def predict(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, of a run or imported.")],
    images: Annotated[list[Path], typer.Argument(help="Images, and folders of images.")],
    out: Annotated[Path, typer.Option(help="The folder to write; must be empty or new.")],
    score_threshold: Annotated[float, typer.Option(help="Draw boxes with at least this score.")] = 0.3,
) -> None:
    """Detect objects in images: pictures with boxes, and a COCO-format results JSON."""
    from raydetr.inference.predict import predict as run_prediction

    run_prediction(checkpoint, images, out, score_threshold=score_threshold)
    typer.echo(f"wrote {out}")


@app.command("import-checkpoint")
def import_checkpoint(
    file: Annotated[Path, typer.Argument(help="An official checkpoint (.pth).")],
    model: Annotated[str, typer.Option(help="A recipe, with or without its epochs, or a paper.")],
    out: Annotated[
        Path | None, typer.Option(help="The folder to write, empty or new; by default named like the file.")
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="A COCO JSON file with its categories; by default COCO's own.")
    ] = None,
) -> None:
    """Convert an official checkpoint, to evaluate it, predict with it, or fine-tune from it."""
    from raydetr.training.import_checkpoint import import_checkpoint as run_import

    out = out or Path(file.stem)
    found = run_import(file, model, out, annotations)
    typer.echo(
        f"{file}: a checkpoint of {found.paper}, {found.num_parameters:,} numbers, {found.num_classes} classes\n"
        f"wrote {out}, with the settings of {found.recipe}\n"
        f"next: raydetr evaluate {out} --data SHARDS, or raydetr train RECIPE init.checkpoint={out}"
    )


@app.command()
def overfit(
    arguments: RecipeAndOverrides = None,
    config: ConfigFile = None,
    data: Annotated[
        str | None, typer.Option(help="A folder of shards, or its URL; by default the recipe's.")
    ] = None,
    images: Annotated[int, typer.Option(help="How many images to learn by heart.")] = 8,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 300,
    long_side: Annotated[int, typer.Option(help="Pixels of the images' long side.")] = 256,
    out: Annotated[Path, typer.Option(help="Folder for overfit.json and the pictures.")] = Path("build"),
) -> None:
    """Train on a few images and evaluate on the same ones: is the data, and the set-up, learnable?"""
    from raydetr.runs.overfit import overfit as run_overfit

    chosen = read_config(arguments or [], config)
    outcome = run_overfit(chosen, data, num_images=images, num_steps=steps, long_side=long_side, out=out)
    typer.echo(outcome.to_text())


@app.command()
def doctor(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA",
            help="Shards, the training split first; without any, this machine is examined.",
        ),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="The recipe that is to be trained on the data.")] = None,
    config: ConfigFile = None,
    short_side: Annotated[
        int | None, typer.Option(min=1, help="Pixels; judge small objects at this scale.")
    ] = None,
    max_side: Annotated[int | None, typer.Option(min=1, help="Pixels; the limit of the long side.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="A file for the result as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="A file for the result as a page with pictures.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that read; by default as many as there are CPUs.")
    ] = None,
) -> None:
    """Examine data, or this machine, before time is spent on training; exit code 1: it must not start."""
    from raydetr.cli import doctor as command

    settings = command.Settings(recipe, config, short_side, max_side, json_file, html, workers)
    text, may_start = command.run(data or [], settings)
    typer.echo(text)
    raise typer.Exit(0 if may_start else 1)


@app.command()
def tune(
    arguments: RecipeAndOverrides = None,
    space: Annotated[Path, typer.Option(help="A YAML file: dotted paths and what to draw for them.")] = Path(
        "space.yaml"
    ),
    trials: Annotated[int, typer.Option(min=1, help="How many configurations to try.")] = 8,
    concurrent: Annotated[int, typer.Option(min=1, help="How many trials run at a time.")] = 1,
    config: ConfigFile = None,
) -> None:
    """Search hyper-parameters: ASHA over trials that are Ray Train runs, one MLflow parent run."""
    from raydetr.tune.search import search
    from raydetr.tune.space import read_space

    chosen = read_config(arguments or [], config)
    outcome = search(chosen, read_space(space, chosen), num_trials=trials, max_concurrent=concurrent)
    typer.echo(outcome.to_text())


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Folders of runs, names of runs or MLflow run ids.")],
    uri: Annotated[
        str | None, typer.Option(help="MLflow tracking URI of named runs; by default sqlite in runs/.")
    ] = None,
) -> None:
    """Compare runs: AP by size and class, and where their configurations differ."""
    from raydetr.runs.compare import compare as compare_runs

    typer.echo(compare_runs(runs, uri, plain=not sys.stdout.isatty()))


def read_config(arguments: list[str], config_file: Path | None) -> RunConfig:
    """The recipe or file that the arguments name, with their overrides.

    Raises:
        ConfigError: neither or both are given, or an override does not fit.
    """
    named = [argument for argument in arguments[:1] if "=" not in argument]
    if named and config_file is not None:
        raise ConfigError(f"a recipe ({named[0]}) and --config {config_file} are given: keep one")
    if not named and config_file is None:
        raise ConfigError("name a recipe first (see `raydetr recipes`), or give --config FILE")
    chosen = recipe_book.find(named[0]) if config_file is None else configuration.from_yaml(config_file)
    return configuration.override(chosen, configuration.parse_assignments(arguments[len(named) :]))


def main() -> None:
    """Run the command line; a mistake of the user ends in one clear line, not in a traceback."""
    # `ray job stop` and schedulers send SIGTERM: end as after Ctrl-C, with the MLflow run closed
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        if not _is_meant_for_users(error):
            raise
        print_status(f"error: {error}")
        sys.exit(1)


def _is_meant_for_users(error: Exception) -> bool:
    """Ours: raised by this project's own code, not from inside a library."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.split(".")[0] in ("raydetr", "detrs")
