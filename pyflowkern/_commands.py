"""The commands themselves.  Heavy imports wait until a command runs, so that ``--help`` is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train normalizing flows, sample from them and score data with them.",
)

DataOption = Annotated[
    str | None,
    typer.Option(help="photos, digits, a .csv or .npy file, or a folder of images."),
]
CheckpointArgument = Annotated[
    Path, typer.Argument(help="A .ckpt file, or the folder of a run (then its last.ckpt).")
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures, metrics and checkpoint.")] = Path(
        "out/demo"
    ),
    minutes: Annotated[float, typer.Option(min=0.1, help="Time for the whole command.")] = 4.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a demo that was interrupted.")
    ] = False,
) -> None:
    """Train a small Glow on photographs and compare the kernels with the reference.

    Needs no download and no GPU.  Prints held-out bits/dim before and after, the round-trip error, and steps/s and
    memory of both paths; writes samples.png, curve.png, metrics.csv and a checkpoint.
    """
    from pyflowkern.train.demo import demo as run

    run(out, minutes=minutes, resume=resume)


@app.command()
def train(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file of options; flags override it.")
    ] = None,
    data: DataOption = None,
    flow: Annotated[
        str | None, typer.Option(help="A flow by name, such as Glow or RealNVP.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any option of the YAML file or argument of the flow, NAME=VALUE; may be repeated. "
            "Example: --set hidden=128 --set levels=2",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Largest learning rate.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with the run in this folder, exactly as if it had not stopped."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that OUT holds.")
    ] = False,
) -> None:
    """Train a flow: checkpoints, metrics.csv, curve.png, TensorBoard and, for images, samples.png.

    Example: pyflowkern train --data table.csv --flow RealNVP --steps 2000 --out out/table
    """
    from pyflowkern.train.config import ConfigError, TrainConfig
    from pyflowkern.train.runner import resume_config
    from pyflowkern.train.runner import train as run

    flags = {"data": data, "flow": flow, "steps": steps, "batch_size": batch_size, "lr": lr}
    options: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    if out is not None:
        options["out"] = str(out)
    if resume is not None:
        if config or options or set_:
            raise ConfigError("--resume takes every option from the run itself; give it alone")
        run(resume_config(resume), resume=True)
        return
    base = TrainConfig.read(config) if config else {}
    run(TrainConfig.create(_merge(base, options, set_ or [])), overwrite=overwrite)


def _merge(base: dict[str, Any], flags: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Lay flags over a config; a setting that is no option of the run is an argument of the flow."""
    import yaml

    from pyflowkern.train.config import ConfigError, TrainConfig

    known = TrainConfig().to_dict()
    merged = {**base, **flags}
    arguments = dict(merged.get("flow_args") or {})
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set wants NAME=VALUE, got {setting!r}")
        parsed = yaml.safe_load(value)
        if isinstance(parsed, str) and isinstance(known.get(name), float):
            parsed = float(value)  # YAML reads 1e-3 as text
        (merged if name in known else arguments)[name] = parsed
    return {**merged, "flow_args": arguments}


@app.command()
def sample(
    checkpoint: CheckpointArgument,
    out: Annotated[
        Path, typer.Option(help="A .png (images), .csv (vectors) or .npy file (either).")
    ],
    n: Annotated[int, typer.Option("-n", "--number", min=1, help="How many samples.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="Below 1: safer, less varied samples.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same samples.")] = 0,
) -> None:
    """Draw samples from a trained flow, in the units of its data.

    Example: pyflowkern sample out/demo --out samples.png
    """
    from pyflowkern.train.inference import save_samples

    save_samples(checkpoint, out, n, temperature=temperature, seed=seed)


@app.command()
def evaluate(
    checkpoint: CheckpointArgument,
    data: DataOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the dequantisation noise.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Score held-out data: bits/dim for images, nats per row in data units for vectors; lower is better.

    Without --data these are the held-out rows of the training data; with --data every row of that file.
    """
    from pyflowkern.train.inference import evaluate_checkpoint

    result = evaluate_checkpoint(checkpoint, data, seed=seed)
    line = "{score:.4f} +- {standard_error:.4f} {unit}, mean over {rows} rows of {data} after {step} steps"
    typer.echo(json.dumps(result) if as_json else line.format(**result))


@app.command()
def info() -> None:
    """Say which kernels serve each device, and why."""
    from pyflowkern import show_config

    typer.echo(show_config())
