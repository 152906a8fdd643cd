"""What a training run is: one flat set of options, from YAML or from flags."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

__all__ = ["ConfigError", "TrainConfig", "merged"]


class ConfigError(ValueError):
    """A run that was asked for wrongly.  The message is one line.

    Example:
        >>> from pyflowkern.train import ConfigError, TrainConfig
        >>> try:
        ...     TrainConfig.create({"steps": 0})
        ... except ConfigError as error:
        ...     print(error)
        steps must be positive, got 0
    """

    exit_code = 2


_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((float,), "a number"),
    "str": ((str,), "text"),
    "bool": ((bool,), "true or false"),
    "dict[str, Any]": ((dict,), "a mapping of names to values"),
}


def _typed(name: str, value: Any, wanted: str) -> Any:
    """Return ``value`` if it is of the wanted type; YAML reads 1e-3 as text, which becomes a number here."""
    types, words = _TYPES[wanted]
    if wanted == "float" and isinstance(value, str | int) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            value = float(value)
    if isinstance(value, bool) != (wanted == "bool") or not isinstance(value, types):
        raise ConfigError(f"{name} must be {words}, got {_shown(value)}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{name} must be below 2^63, got {_shown(value)}")
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{name} must not hold a NUL character, got {_shown(value)}")
    return value


def _shown(value: Any, longest: int = 80) -> str:
    """Return ``value`` as a message shows it; Python refuses to print numbers of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= longest else f"{text[:longest]} ..."


@dataclass(frozen=True)
class TrainConfig:
    """The options of a training run.

    Raises:
        ConfigError: by :meth:`create`, one line, for unknown options and values that are out of range.

    Example:
        >>> from pyflowkern.train import TrainConfig
        >>> TrainConfig.create({"data": "digits", "flow": "RealNVP", "steps": 100}).steps
        100
    """

    data: str = "photos"  #: photos, digits, a .csv, .npy or .parquet file, or a folder of images
    size: int = 32  #: side of patches or images, for photos and folders
    data0: str = ""  #: of a bridge, in place of data: where it begins
    data1: str = ""  #: and where it ends
    context_columns: str = ""  #: of a table: columns on which the others depend, such as a,b
    label_column: str = ""  #: of a table: the column of classes on which the others depend
    labels: bool = False  #: the labels of digits as classes
    stream: str = "auto"  #: leave the rows of a .npy or .parquet file there: always, never, or auto, from 1 GiB on
    flow: str = "Glow"  #: a class of pyflowkern.flows, or SchrodingerBridge
    flow_args: dict[str, Any] = field(default_factory=dict)  #: arguments of the flow, by name
    out: str = "out/train"  #: folder of the run
    steps: int = 2000  #: training steps
    batch_size: int = 64  #: rows of a step, of all processes together
    lr: float = 1e-3  #: learning rate of AdamW, at its largest
    warmup: int = 50  #: steps of linear warm-up; a cosine follows
    final_lr: float = 0.05  #: where the cosine ends, as a fraction of lr
    weight_decay: float = 1e-4  #: of AdamW
    clip: float = 1.0  #: largest gradient norm
    ema: float = (
        0.999  #: decay of the moving average of the weights, which is evaluated and sampled
    )
    precision: str = "32-true"  #: or bf16-mixed
    every: int = 100  #: steps between evaluations; a checkpoint follows each
    patience: int = 0  #: evaluations without progress before stopping early; 0: never
    max_bad_steps: int = 10  #: consecutive non-finite steps before stopping
    minutes: float = 0.0  #: stop after this long; 0: no limit
    threads: int = 0  #: CPU threads; 0: one for a small flow, as many as PyTorch has for others
    devices: int = 1  #: processes a machine, each with a GPU of its own if there are any; torchrun's number comes first
    nodes: int = 1  #: machines
    seed: int = 0  #: of the split, the first weights and every random number of the run

    @classmethod
    def create(cls, options: dict[str, Any]) -> TrainConfig:
        """Check options and fill in the defaults."""
        known = {f.name: str(f.type) for f in fields(cls)}
        for name in options:
            if name not in known:
                raise ConfigError(
                    f"unknown option {name!r}; known are {', '.join(known)} "
                    "(arguments of the flow belong under flow_args)"
                )
        config = cls(**{name: _typed(name, value, known[name]) for name, value in options.items()})
        positive = ("size", "steps", "batch_size", "lr", "clip", "every", "max_bad_steps")
        for name in (*positive, "devices", "nodes"):
            if not 0 < getattr(config, name) < float("inf"):
                raise ConfigError(f"{name} must be positive, got {getattr(config, name)}")
        if config.lr > 1e3:  # AdamW moves every weight by as much: far on, float32 overflows
            raise ConfigError(f"lr must be at most 1000, got {config.lr}")
        for name in ("warmup", "weight_decay", "patience", "minutes", "threads", "seed"):
            if not 0 <= getattr(config, name) < float("inf"):
                raise ConfigError(f"{name} must not be negative, got {getattr(config, name)}")
        if config.threads > 1024:
            raise ConfigError(f"threads must be at most 1024, got {config.threads}")
        for name in ("ema", "final_lr"):
            if not 0 <= getattr(config, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(config, name)}")
        given = [bool(v) for v in (config.context_columns, config.label_column, config.labels)]
        if sum(given) > 1:
            raise ConfigError(
                "context_columns, label_column and labels exclude each other: give one of them"
            )
        if config.stream not in ("auto", "always", "never"):
            raise ConfigError(f"stream must be auto, always or never, got {config.stream!r}")
        if config.precision not in ("32-true", "bf16-mixed"):
            raise ConfigError(f"precision must be 32-true or bf16-mixed, got {config.precision!r}")
        return config

    @classmethod
    def stored(cls, options: dict[str, Any]) -> TrainConfig:
        """Check the options of a run, which an earlier version may have written: it read every file whole."""
        return cls.create({"stream": "never"} | options)

    @staticmethod
    def read(path: Path) -> dict[str, Any]:
        """Return the options of a YAML file."""
        if path.is_fifo() and path.parts[:2] not in (("/", "dev"), ("/", "proc")):
            raise ConfigError(
                f"{path}: is a named pipe, wants a file"
            )  # reading it could wait for ever
        try:
            options = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(
                f"{path}: not a readable YAML file ({' '.join(str(error).split())})"
            ) from None
        if not isinstance(options, dict):
            raise ConfigError(f"{path}: wants `option: value` lines")
        return {str(name): value for name, value in options.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return every option, as a checkpoint stores it."""
        return asdict(self)

    def to_yaml(self) -> str:
        """Return every option as YAML."""
        return str(yaml.safe_dump(self.to_dict(), sort_keys=False))


def merged(base: dict[str, Any], flags: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Lay flags over a config; a setting that is no option of the run is an argument of the flow."""
    known = TrainConfig().to_dict()
    together, arguments = {**base, **flags}, {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not (name and equals):
            raise ConfigError(f"--set wants NAME=VALUE, got {setting!r}")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise ConfigError(f"--set {setting}: the value is not readable as YAML") from None
        if name in known:
            together[name] = value
        else:
            arguments[name.removeprefix("flow_args.")] = value
    given = together.get("flow_args", {})
    if arguments and isinstance(given, dict):  # anything else TrainConfig.create refuses
        together["flow_args"] = {**given, **arguments}
    return together
