"""The commands themselves.  Heavy imports wait until a command runs, so that ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pyflowkern._run_commands import DATA, evaluate, export, plot, sample

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def root() -> None:
    """Train normalizing flows, draw samples from them and score data with them.

    A normalizing flow learns the density of your data: it gives the probability of a row and draws new rows.

    \b
    Start with   pyflowkern demo
    then         pyflowkern train --data digits --out out/digits
                 pyflowkern sample out/digits --out samples.png
                 pyflowkern evaluate out/digits
                 pyflowkern plot out/digits
    """  # noqa: D301  (\b keeps click from re-wrapping the lines)


@app.command(short_help="Train a small flow on photographs; kernels beside reference.")
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder to write to; an earlier demo in it is replaced.")
    ] = Path("out/demo"),
    minutes: Annotated[
        float, typer.Option(help="Time for the whole command; more gives better samples.")
    ] = 4.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a demo that was interrupted.")
    ] = False,
) -> None:
    """Train a small Glow on photographs, and compare the fused kernels with the PyTorch reference.

    Needs no download and no GPU.  Prints, for photographs that were held out of training, bits/dim (how many bits
    a colour value costs; lower is better, 8 is no model at all) before and after, the error of mapping them to latents
    and back, and steps per second and peak memory with the kernels and with the reference.

    Writes samples.png, curve.png, metrics.csv, last.ckpt and best.ckpt.
    """
    from pyflowkern.train.demo import demo as run

    run(out, minutes=minutes, resume=resume)


@app.command(short_help="Train a flow on your data, or go on with a run.")
def train(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="A YAML file of options; flags override it."),
    ] = None,
    data: Annotated[str | None, typer.Option(help=f"{DATA}.  [default: photos]")] = None,
    flow: Annotated[
        str | None,
        typer.Option(
            help="Which flow: Glow, RealNVP, NSF, CNF, FFJORD or FlowMatching; for rows also MAF or IAF; or "
            "SchrodingerBridge from --data0 to --data1.  [default: Glow]"
        ),
    ] = None,
    data0: Annotated[
        str | None, typer.Option(help="Of a bridge: a file of rows where it begins.")
    ] = None,
    data1: Annotated[
        str | None, typer.Option(help="Of a bridge: a file of rows where it ends.")
    ] = None,
    context_columns: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Of a table: columns, by name or by number from 1, on which the density of the others depends.",
        ),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            metavar="C",
            help="Of a table: the column with the class of a row, a whole number, on which the others depend.",
        ),
    ] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="Of digits: their labels, as classes.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Set an option of the list above, or an argument of the flow: hidden=128, levels=2, "
            "flow_args.steps=8.  May be repeated.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="How many training steps.  [default: 2000]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="How many rows a step sees.  [default: 64]")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate, at its largest.  [default: 0.001]")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Activations of a discrete flow: stored, or reversible, which makes them again by inverses: memory "
            "does not grow with depth, a step takes a third longer.  [default: stored]"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to.  [default: out/train]")
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(help="Processes a machine, that share each batch: one a GPU.  [default: 1]"),
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Machines.  [default: 1]")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with the run in this folder, exactly as if it had not stopped.  Given alone, or with "
            "another number of --devices and --nodes."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that the folder holds already.")
    ] = False,
) -> None:
    """Train a flow on your data.

    Writes to the folder of the run: last.ckpt and best.ckpt (best held-out score), config.yaml, metrics.csv, curve.png,
    TensorBoard logs and, for images, samples.png.  A tenth of the rows is held out and scored as training goes.  At the
    end it is drawn beside samples, as plot does again: pairs.png, for two columns density.png, for images beside.png.

    \b
    Example  pyflowkern train --data table.csv --flow NSF --steps 2000 --out out/table
    Context  pyflowkern train --data table.csv --flow NSF --context-columns age,dose --out out/table
    Labels   pyflowkern train --data digits --labels --flow FlowMatching --set conv=unet --out out/digits
    Bridge   pyflowkern train --flow SchrodingerBridge --data0 a.csv --data1 b.csv --out out/bridge
    Resume   pyflowkern train --resume out/table
    2 GPUs   pyflowkern train --data table.csv --flow NSF --devices 2 --out out/table

    \b
    Options of the YAML file and of --set, with their defaults:
      context_columns: '', label_column: '', labels: False
      data: photos, stream: auto   rows stay in a .npy or .parquet file: always, never, or auto, from 1 GiB on
      data0: '', data1: '', flow: Glow, out: out/train, steps: 2000, batch_size: 64, lr: 0.001
      flow_args: {}          arguments of the flow, such as levels, steps, transforms, hidden
      size: 32               side of the images, for photos and folders
      warmup: 50             steps of linear warm-up; a cosine follows
      final_lr: 0.05         where the cosine ends, as a fraction of lr
      weight_decay: 0.0001   of AdamW
      clip: 1.0              largest gradient norm
      ema: 0.999             decay of the averaged weights, which are evaluated
      precision: 32-true     or bf16-mixed
      every: 100             steps between evaluations, each with a checkpoint
      patience: 0            evaluations without progress before stopping; 0: never
      minutes: 0.0           stop after this long; 0: no limit
      max_bad_steps: 10      steps in a row with a non-finite loss before stopping
      threads: 0             CPU threads; 0: one for a small flow, else all
      devices: 1, nodes: 1   processes a machine, and machines; torchrun's numbers come first
      seed: 0

    Ctrl-C, SIGTERM and SIGHUP end the run after the step that they come in, with a checkpoint to resume from.
    """  # noqa: D301
    from pyflowkern.train.config import ConfigError, TrainConfig, merged
    from pyflowkern.train.runner import resume_config
    from pyflowkern.train.runner import train as run

    flags: dict[str, Any] = {"data": data, "data0": data0, "data1": data1, "flow": flow}
    flags |= {"steps": steps, "batch_size": batch_size, "lr": lr, "labels": labels or None}
    flags |= {"context_columns": context_columns, "label_column": label_column}
    options: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
    if memory is not None:
        set_ = [*(set_ or []), f"flow_args.memory={memory}"]
    if out is not None:
        options["out"] = str(out)
    processes = {k: n for k, n in (("devices", devices), ("nodes", nodes)) if n is not None}
    if resume is not None:
        if config or options or set_ or overwrite:
            raise ConfigError("--resume takes every option from the run itself; give it alone")
        chosen = TrainConfig.create(resume_config(resume).to_dict() | processes)
        finished = run(chosen, resume=True)
    else:
        base = TrainConfig.read(config) if config else {}
        chosen = TrainConfig.create(merged(base, options | processes, set_ or []))
        finished = run(chosen, overwrite=overwrite)
    if finished.rank == 0:
        typer.echo(f"{finished.out}: last.ckpt, best.ckpt, metrics.csv, curve.png and more")


@app.command(short_help="Train several flows on one split and compare them.")
def compare(
    flow: Annotated[
        list[str],
        typer.Option(
            metavar="FLOW[,NAME=VALUE...]",
            help="A flow, and arguments of it: NSF,transforms=3.  Given twice at least.",
        ),
    ],
    data: Annotated[str, typer.Option(help=f"{DATA}.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("out/compare"),
    config: Annotated[
        Path | None, typer.Option(help="A YAML file of options of train, for all flows.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="As of train, for all flows."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of each.  [default: 2000]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides split and start.  [default: 0]")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with a comparison that was ended; try flows again that diverged.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the comparison in the folder.")
    ] = False,
) -> None:
    """Train several flows on the same rows with the same budget, and compare them on rows that were held out.

    Prints, the best first, the mean log-density of held-out rows in nats with its standard error (for images bits/dim,
    too), the difference to the best flow, row by row, with its own error, and how large and how quick each is.  A
    difference below two or three of its errors may be chance.  Writes comparison.json and comparison.csv, and each
    run's folder.

    \b
    Example  pyflowkern compare --data table.csv --flow NSF --flow MAF,transforms=3 --steps 1000 --out out/compare
    """  # noqa: D301
    from pyflowkern.train.comparison import compare as run
    from pyflowkern.train.comparison import configs_of, table_of

    given = {"data": data, "steps": steps, "seed": seed}
    options = {name: value for name, value in given.items() if value is not None}
    configs = configs_of(flow, config, options, set_ or [])
    rows = run(configs, out, resume=resume, overwrite=overwrite)
    typer.echo(f"{table_of(rows)}\n{out}: comparison.json, comparison.csv and the runs")


app.command(short_help="Draw samples from a trained flow.")(sample)
app.command(short_help="Score data with a trained flow; lower is better.")(evaluate)
app.command(short_help="Draw the pictures of a run again.")(plot)
app.command(short_help="Write the weights of a run to a safetensors file.")(export)


@app.command(short_help="Say which kernels run on this machine.")
def info() -> None:
    """Say, for each device, which operations fused kernels serve, which the PyTorch reference, and why.

    The same page as pyflowkern.show_config() in Python; add it to a bug report.
    """
    from pyflowkern import show_config

    typer.echo(show_config())
