"""Command line of the offline side: `python -m models train RECIPE --data DIR --out DIR`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from models.logs import log_to_stderr
from models.recipes import RECIPES, RecipeError, recipe_by_name

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""


class Device(StrEnum):
    """Where to train."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@app.callback()
def commands() -> None:
    """Train and evaluate 1-Lipschitz classifiers."""
    log_to_stderr()


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help=f"One of: {', '.join(sorted(RECIPES))}.")],
    out: Annotated[Path, typer.Option(help="Results go to OUT/RECIPE, checkpoints to OUT/.checkpoints/RECIPE.")],
    data: Annotated[
        Path,
        typer.Option(help="Folder of the data set; image-folder: of the classes, or of train/ and test/ with them."),
    ] = Path("data"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's number.")] = None,
    seed: Annotated[int, typer.Option(help="Of initial weights, order and augmentation.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each process; all by default.")] = None,
    device: Annotated[Device, typer.Option(help="auto: CUDA where there is one.")] = Device.AUTO,
    devices: Annotated[int, typer.Option(min=1, help="GPUs, or processes on the CPU; they share each batch.")] = 1,
    tensorboard: Annotated[bool, typer.Option(help="Curves in OUT/.checkpoints/RECIPE/tensorboard.")] = True,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, e.g. loss.min_margin=2; may be repeated.")
    ] = None,
) -> None:
    """Train a recipe; export and measure the artefact, or draw and measure the toy problem."""
    # torch takes seconds to load; --help should not.
    from models.data.labelled import DataError
    from models.export import ExportRefusedError
    from models.runs import run_recipe
    from models.training.errors import Interrupted, TrainingError
    from service.artefact.card import ArtefactError
    from service.certificate import UnsupportedGraphError

    changes = [*(overrides or []), *([f"schedule.epochs={epochs}"] if epochs is not None else [])]
    try:
        summary = run_recipe(
            recipe_by_name(recipe, changes),
            data=data,
            out=out,
            resume=resume,
            seed=seed,
            threads=threads,
            device_name=device.value,
            devices=devices,
            tensorboard=tensorboard,
        )
    except Interrupted as interruption:
        typer.echo(str(interruption), err=True)
        raise typer.Exit(INTERRUPTED) from interruption
    except (
        RecipeError,
        DataError,
        TrainingError,
        ExportRefusedError,
        ArtefactError,
        UnsupportedGraphError,
    ) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(summary)


class ProviderName(StrEnum):
    """Execution provider, as the server's LIPCERT_PROVIDER."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@app.command()
def evaluate(
    artefact: Annotated[Path, typer.Argument(help="Folder with model.onnx, transport.onnx and card.json.")],
    data: Annotated[
        Path, typer.Option(help="Folder of the data set that the card names, as it was given to `train`.")
    ] = Path("data"),
    attacks: Annotated[bool, typer.Option(help="Attack by foolbox and ART, inside the radius and beyond.")] = True,
    n_attack: Annotated[
        int | None, typer.Option(min=1, help="Attack so many images, evenly spaced; by default 1000, or all of fewer.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many images, evenly spaced; the card stays.")
    ] = None,
    provider: Annotated[ProviderName, typer.Option(help="auto: CUDA where there is one.")] = ProviderName.AUTO,
    threads: Annotated[int, typer.Option(min=1, help="Threads of ONNX Runtime.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder of the report; ARTEFACT/report by default.")] = None,
) -> None:
    """Measure an artefact as it is served; write its report and its card. After Ctrl-C the same command goes on."""
    from models.data.labelled import DataError
    from models.evaluation.measure import EvaluationError, EvaluationInterrupted
    from models.evaluation.measure import evaluate as evaluate_artefact
    from service.artefact.card import ArtefactError

    try:
        report = evaluate_artefact(
            artefact,
            data,
            attacks=attacks,
            n_attack=n_attack,
            limit=limit,
            provider=provider.value,
            threads=threads,
            out=out,
        )
    except EvaluationInterrupted as interruption:
        typer.echo(str(interruption), err=True)
        raise typer.Exit(INTERRUPTED) from interruption
    except (ArtefactError, DataError, EvaluationError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(report)


if __name__ == "__main__":
    app()
