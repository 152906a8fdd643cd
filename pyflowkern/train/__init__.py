"""Training on Lightning (needs the extra ``pyflowkern[train]``)."""

from pyflowkern.train.comparison import compare
from pyflowkern.train.config import ConfigError, TrainConfig
from pyflowkern.train.module import FlowModule, TrainingDiverged
from pyflowkern.train.pictures import plot
from pyflowkern.train.ranks import ProcessLost
from pyflowkern.train.runner import Run, train
from pyflowkern.train.signals import TrainingInterrupted

__all__ = [
    "ConfigError",
    "FlowModule",
    "ProcessLost",
    "Run",
    "TrainConfig",
    "TrainingDiverged",
    "TrainingInterrupted",
    "compare",
    "plot",
    "train",
]
