"""The commands for a trained run, which :mod:`pyflowkern._commands` registers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["DATA", "ProgressOption", "evaluate", "export", "plot", "sample"]

DATA = "photos, digits, a .csv, .npy or .parquet file, or a folder of images"
ProgressOption = Annotated[
    bool | None,
    typer.Option(
        "--progress/--no-progress", help="Show a bar on stderr.  [default: if that is a terminal]"
    ),
]
CheckpointArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="The folder of a trained run (its last.ckpt is used), or one .ckpt file in it.",
    ),
]


def sample(
    run: CheckpointArgument,
    out: Annotated[
        Path,
        typer.Option(
            help="File to write: .png (a grid of images), .csv or .parquet (rows of numbers) or .npy (either)."
        ),
    ],
    n: Annotated[int, typer.Option("-n", "--number", min=1, help="How many samples.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="From 0 on.  Below 1: more typical, less varied samples.")
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same samples.")
    ] = 0,
    start: Annotated[
        str | None,
        typer.Option(
            help="Of a bridge: a file of rows where paths begin.  [default: rows of the table at that end]"
        ),
    ] = None,
    backward: Annotated[
        bool,
        typer.Option("--backward", help="Of a bridge: run from the second table to the first."),
    ] = False,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBERS",
            help="Of a run with context columns: their values, such as 0.5,2, or a file with a row for each sample.",
        ),
    ] = None,
    label: Annotated[
        int | None,
        typer.Option(help="Of a run with labels: of which class.  [default: all in turn]"),
    ] = None,
    guidance: Annotated[
        float,
        typer.Option(
            help="Of FlowMatching with contexts: the weight of the condition; above 1 more typical of it."
        ),
    ] = 1.0,
    progress: ProgressOption = None,
) -> None:
    """Draw samples from a trained flow, in the units of the data it was trained on.

    Samples of a bridge are where paths end that begin at rows of the first table.  Of millions of samples only some are
    in memory at a time; the file appears when it is whole.

    \b
    Example  pyflowkern sample out/demo --out samples.png --temperature 0.8
    """  # noqa: D301
    from pyflowkern.train.inference import save_samples

    save_samples(
        run,
        out,
        n,
        temperature=temperature,
        seed=seed,
        start=start,
        backward=backward,
        context=context,
        label=label,
        guidance=guidance,
        bar=progress,
    )
    typer.echo(f"{out}: {n} samples")


def evaluate(
    run: CheckpointArgument,
    data: Annotated[
        str | None,
        typer.Option(help=f"{DATA}.  [default: the held-out rows of the training data]"),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=2**63 - 1, help="Images: seed of the noise added below the last bit."
        ),
    ] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON instead of a sentence.")
    ] = False,
    progress: ProgressOption = None,
) -> None:
    """Score data with a trained flow: the mean over rows, and its standard error.  Lower is better.

    Images are scored in bits per dimension (bits that one colour value costs), rows of numbers in nats per row: the
    negative log-density in the units of the data.  Every row of a file given with --data counts; of the training data
    and of the named sets only the held-out rows do.

    \b
    Example  pyflowkern evaluate out/table --data new.csv
    """  # noqa: D301
    from pyflowkern.train.inference import evaluate_checkpoint

    result = evaluate_checkpoint(run, data, seed=seed, bar=progress)
    what = "negative log-density, " if result["unit"] == "nats" else ""
    line = (
        f"{{score:.4f}} +- {{standard_error:.4f}} {{unit}} ({what}lower is better), "
        "mean over {rows} rows of {data} after {step} steps"
    )
    typer.echo(json.dumps(result) if as_json else line.format(**result))


def export(
    run: CheckpointArgument,
    out: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
) -> None:
    """Write the averaged weights of a trained flow to a safetensors file, which holds numbers and text alone.

    In Python, pyflowkern.flows.load_flow makes the flow again, and load_weights reads the weights into one that is made
    already.  Needs pip install 'pyflowkern[safetensors]'.

    \b
    Example  pyflowkern export out/table --out table.safetensors
    """  # noqa: D301
    from pyflowkern.train.export import export_weights

    units = {"data": "of the data", "standardized": "of standardized columns"}
    typer.echo(f"{out}: weights; densities are in units {units[export_weights(run, out)]}")


def plot(
    run: CheckpointArgument,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the pictures.  [default: that of the run]")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="File of rows to draw beside samples.  [default: the held-out rows of the training data]"
        ),
    ] = None,
    n: Annotated[
        int,
        typer.Option(
            "-n", "--number", min=1, max=2000, help="How many samples, and rows at most."
        ),
    ] = 2000,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**63 - 1, help="Of the samples.  [default: that of the run]"),
    ] = None,
) -> None:
    """Draw the pictures of a run again, as train draws them at its end.

    Rows of numbers: pairs.png, each column against each other, held-out rows beside samples (the first eight columns of
    more), and for two columns density.png, the log-density of the flow with the held-out rows.  Images: beside.png,
    held-out images beside samples.  Samples of a run with contexts or labels are those of the held-out rows.  A
    bridge: rows of both tables, and the ends of paths from the first.  The curve is drawn from metrics.csv.

    \b
    Example  pyflowkern plot out/table
    """  # noqa: D301
    from pyflowkern.train.pictures import plot as draw

    for path, what in draw(run, out, data=data, n=n, seed=seed).items():
        typer.echo(f"{path}: {what}")
