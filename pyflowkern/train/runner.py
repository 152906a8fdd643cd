"""Train any flow on any data set, from a config to a folder with checkpoints, metrics and pictures."""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer

from pyflowkern._memory import keep_memory
from pyflowkern.core.files import write_atomic
from pyflowkern.data import DataSet
from pyflowkern.data.dataset import repeated_columns
from pyflowkern.train.bridges import load_data
from pyflowkern.train.callbacks import (
    Bar,
    EventLog,
    History,
    KeepLastAndBest,
    SampleGrid,
    StopEarly,
)
from pyflowkern.train.checkpoint import CheckpointIO, check_resumable
from pyflowkern.train.config import ConfigError, TrainConfig
from pyflowkern.train.model import build, with_defaults, with_earlier_defaults
from pyflowkern.train.module import FlowModule, TrainingDiverged
from pyflowkern.train.pictures import PICTURES, draw_at_end
from pyflowkern.train.ranks import (
    check_started,
    lost_processes,
    started_by_torchrun,
    strategy_options,
    threads_for_processes,
)
from pyflowkern.train.signals import StopSignals, TrainingInterrupted
from pyflowkern.train.threads import limited_threads

__all__ = ["Run", "check_folder", "resume_config", "train"]

#: What an earlier run leaves, beside TensorBoard's logs.
_LEFT = ("last.ckpt", "best.ckpt", "metrics.csv", "curve.png", "samples.png", *PICTURES)


@dataclass(frozen=True)
class Run:
    """What a training run leaves behind.

    Example:
        >>> from pyflowkern.train import TrainConfig, train
        >>> run = train(TrainConfig(data="digits", steps=200, out="out/digits"))  # doctest: +SKIP
        >>> run.history[-1]["held_out"], run.out / "last.ckpt"  # doctest: +SKIP
        (2.94, PosixPath('out/digits/last.ckpt'))
    """

    module: FlowModule  #: what was trained; ``module.evaluated`` has the averaged weights
    history: list[dict[str, float]]  #: the rows of ``metrics.csv``, one for each evaluation
    out: Path  #: the folder of the run

    @property
    def rank(self) -> int:
        """Which of the processes of the run this is; the first one, 0, has written the files."""
        return self.module.rank


def resume_config(out: Path) -> TrainConfig:
    """Return the config that a run's folder holds; the folder itself may have been moved."""
    if not (out / "config.yaml").exists():
        raise ConfigError(f"{out}: holds no run to resume (no config.yaml)")
    stored = TrainConfig.stored(TrainConfig.read(out / "config.yaml"))
    return replace(with_earlier_defaults(stored), out=str(out))


def check_folder(out: Path) -> None:
    """Raise ConfigError if ``out`` cannot become a folder."""
    existing = next(path for path in (out, *out.parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"{existing}: is a file, wants a folder")


def train(
    config: TrainConfig,
    data: DataSet | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Run:
    """Train and write ``last.ckpt``, ``best.ckpt``, ``metrics.csv``, ``curve.png`` and, for images, ``samples.png``.

    At its end a run draws held-out data beside samples, as :func:`plot` does again.  What cannot be drawn, for want of
    matplotlib or for another reason, is a line on stderr.

    Nothing is written before the data, the flow and a checkpoint to go on from have been found good.  SIGINT (Ctrl-C),
    SIGTERM and SIGHUP end the run after the step that they come in, with a checkpoint; a second one ends it at once.

    With ``devices`` or ``nodes`` above 1, or under torchrun, several processes share each batch.  They are started by
    torchrun or SLURM, else by Lightning, which runs this script again for each; all but the first are silent, write
    nothing, and end with exit code 0 where a signal or numbers that are not finite end the run.

    Args:
        config: The options of the run.
        data: The data; loaded from ``config.data``, or ``data0`` and ``data1``, when not given.
        resume: Go on from ``last.ckpt`` in ``config.out``, or from ``best.ckpt`` if that is gone; from the start if
            the run ended before its first checkpoint.
        overwrite: Allow ``config.out`` to hold another run already, whose files are removed.

    Raises:
        ConfigError: one line, for options or a checkpoint that cannot be used.
        ProcessLost: one line, when another process of the run was killed or failed.
        DataError: one line, for data that cannot be used.
        TrainingDiverged: when too many steps in a row were not finite.
        TrainingInterrupted: after a signal.
        OSError: naming the file that could not be written.

    Example:
        >>> from pyflowkern.train import TrainConfig, train
        >>> train(TrainConfig(data="digits", steps=200, out="out/digits"))  # doctest: +SKIP
    """
    out, config = Path(config.out), started_by_torchrun(with_defaults(config))
    check_folder(out)
    keep_memory()
    if not (resume or overwrite) and any((out / name).exists() for name in _LEFT[:2]):
        raise ConfigError(
            f"{out}: holds a run already; resume it, overwrite it or name another folder"
        )
    data = data or load_data(config)
    checkpoint, remark = _checkpoint_of(out) if resume else (None, "")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        module = FlowModule(config, data, build(config, data))
    done = check_resumable(checkpoint, module) if checkpoint else 0
    rows = -(-config.batch_size // (config.devices * config.nodes))
    with limited_threads(module.model, rows, data.shape, config.threads, config.devices):
        trainer, history = _trainer(module, out, done)
        try:
            if trainer.is_global_zero:
                _begin(out, module, checkpoint, remark)
            _fit(trainer, module, checkpoint)
            draw_at_end(module, out)
        except OSError as error:  # TensorBoard's do not say which file
            if error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror or str(error), str(out)) from None
    return Run(module, history.rows, out)


def _begin(out: Path, module: FlowModule, checkpoint: Path | None, remark: str) -> None:
    """Make the folder that of this run, and say what is unusual."""
    if remark:
        print(remark, flush=True)
    if not checkpoint:
        _remove_run(out)
        for line in repeated_columns(module.data) if module.unit == "nats" else ():
            print(line, flush=True)
    write_atomic(out / "config.yaml", module.config.to_yaml().encode())


def _checkpoint_of(out: Path) -> tuple[Path | None, str]:
    """Return where a run goes on from, None for one that ended before its first checkpoint, and what is unusual."""
    last, best = (out / name for name in _LEFT[:2])
    if last.exists():
        return last, ""
    if best.exists():
        return best, f"{last} is gone; going on from {best}, which may be older"
    if (out / "tensorboard").exists() and _reached(out / "metrics.csv") > 0:
        raise ConfigError(
            f"{out}: last.ckpt and best.ckpt are gone, so there is nothing to go on from; "
            "start again with --overwrite"
        )
    started = (out / "config.yaml").exists()
    return None, f"{out}: no checkpoint was written yet; starting at step 0" if started else ""


def _reached(metrics: Path) -> int:
    """Return the step of the last evaluation that a run wrote down."""
    try:
        return int(metrics.read_text(encoding="utf-8").splitlines()[-1].split(",")[0])
    except (OSError, ValueError, IndexError):
        return 0


def _remove_run(out: Path) -> None:
    """Remove what an earlier run left, so that nothing of it is taken for this run's."""
    for path in (*(out / name for name in _LEFT), *(out / "tensorboard").glob("events.*")):
        path.unlink(missing_ok=True)


def _trainer(module: FlowModule, out: Path, done: int) -> tuple[Trainer, History]:
    """Return a trainer that has written nothing yet, and its history."""
    config = module.config
    bar = sys.stderr.isatty()
    module.signals = StopSignals(together=config.devices * config.nodes > 1)
    history = History(out, talk=not bar)
    callbacks: list[Callback] = [history, KeepLastAndBest(out, module.signals)]
    if module.data.is_image:
        callbacks.append(SampleGrid(out))
    if config.patience:
        callbacks.append(StopEarly(history, config.patience))
    if bar:
        callbacks.append(Bar(module.unit))
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # an "epoch" of Lightning is the steps up to the next evaluation; it counts those of this process alone
    rounds = -(-config.steps // config.every) - done // config.every if done < config.steps else 0
    options = strategy_options(config, module.model, module.data)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            trainer = Trainer(
                max_epochs=rounds,
                reload_dataloaders_every_n_epochs=1,
                accelerator="auto",
                precision=config.precision,  # type: ignore[arg-type]
                plugins=[CheckpointIO()],
                callbacks=callbacks,
                logger=EventLog(out, name="tensorboard", version="", purge_step=done),
                num_sanity_val_steps=0,
                enable_model_summary=False,
                enable_progress_bar=bar,
                **options,
            )
        check_started(trainer.strategy, config)
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        # more devices than there are, or other processes than srun has started
        raise ConfigError(" ".join(str(error).split())) from None
    return trainer, history


def _fit(trainer: Trainer, module: FlowModule, checkpoint: Path | None) -> None:
    signals = module.signals
    ranks = trainer.world_size
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning" if trainer.is_global_zero else "")
        warnings.filterwarnings("ignore", "Grad strides do not match")  # a copy more, of a row
        signals.install()
        try:
            with lost_processes(Path(module.config.out), ranks), threads_for_processes(ranks):
                trainer.fit(module, ckpt_path=checkpoint)
        except (TrainingInterrupted, TrainingDiverged):
            if trainer.is_global_zero:
                raise
            raise SystemExit(0) from None  # all end together, and the first one says why
        finally:
            signals.restore()
