"""The command line: ``respiro demo | fit | validate | test | predict | data | audit``."""

from __future__ import annotations

import argparse
import itertools
import pkgutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from respiro import __version__
from respiro.errors import RespiroError

__all__ = ["main"]

COMMANDS = {
    "demo": "write a synthetic data set, train on it for a minute, and show the report",
    "fit": "train a method on a data set, from a YAML config or from options",
    "validate": "score a checkpoint on the validation side",
    "test": "score a checkpoint on the test side, with intervals, groups and figures",
    "predict": "classify sound files with a checkpoint",
    "data": "show and check a data set on disk, or download it",
    "audit": "show what the sides of a split share: patients, takes, identical sound, devices",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run one command; exit with 2 and one clear message on anything a user can mend."""
    argv = list(sys.argv[1:] if args is None else args)
    parser = argparse.ArgumentParser(
        prog="respiro",
        description="Respiratory-sound classification with honest evaluation.",
        epilog="commands:\n"
        + "".join(f"  {name:9} {text}\n" for name, text in COMMANDS.items())
        + "\n'respiro COMMAND --help' shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"respiro {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    chosen = parser.parse_args(argv[:1] or ["--help"])
    run: dict[str, Callable[[list[str]], None]] = {
        "demo": _demo,
        "fit": _fit,
        "validate": lambda rest: _score(rest, "val"),
        "test": lambda rest: _score(rest, "test"),
        "predict": _predict,
        "data": _data,
        "audit": _audit,
    }
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # between Lightning and torch; no user can mend it
    try:
        run[chosen.command](argv[1:])
    except (RespiroError, ValueError, OSError, ImportError) as error:
        print(f"respiro {chosen.command}: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


def _parser(command: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"respiro {command}", description=_describe(command))


def _describe(command: str) -> str:
    return f"{COMMANDS[command].capitalize()}."


def _demo(argv: list[str]) -> None:
    parser = _parser("demo")
    parser.add_argument("--output", default="respiro_demo", help="folder for data, checkpoint and report (%(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="training epochs (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the data, the split and the training (%(default)s)")
    options = parser.parse_args(argv)

    from lightning.pytorch import Trainer, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint

    from respiro.datamodules import ICBHIDataModule
    from respiro.datasets import write_synthetic_icbhi
    from respiro.evaluation import evaluate
    from respiro.methods import SoundClassifier
    from respiro.models import CNN6

    started = time.perf_counter()
    output = Path(options.output)
    seed_everything(options.seed, verbose=False)
    root = write_synthetic_icbhi(output / "synthetic_icbhi", seed=options.seed)
    data = ICBHIDataModule(root, batch_size=16, duration=3.0, seed=options.seed)
    best = ModelCheckpoint(output / "checkpoints", monitor="val_score", mode="max", enable_version_counter=False)
    trainer = Trainer(
        max_epochs=options.epochs,
        accelerator="auto",
        devices=1,
        callbacks=[best],
        logger=False,
        default_root_dir=output,
        enable_model_summary=False,
    )
    trainer.fit(SoundClassifier(CNN6()), datamodule=data)
    model = SoundClassifier.load_from_checkpoint(best.best_model_path, weights_only=True)
    report = evaluate(model, data, output_dir=output / "report")
    print(f"\n{report}\n")
    print(
        f"Synthetic sounds: these scores say that the installation works, nothing about patients. "
        f"{time.perf_counter() - started:.0f} s in all."
    )
    print(f"Report and figures: {output / 'report'}\nCheckpoint: {best.best_model_path}")


def _fit(argv: list[str]) -> None:
    from respiro._cli_fit import fit

    fit(argv)


def _score(argv: list[str], side: Literal["val", "test"]) -> None:
    """Restore the model; take the data from the checkpoint's record wherever the options leave it open."""
    from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]

    from respiro.datamodules.base import RespiratoryDataModule
    from respiro.evaluation import evaluate
    from respiro.methods._checkpoint import RECORD, read_checkpoint, restore

    command = "test" if side == "test" else "validate"
    parser = ArgumentParser(
        prog=f"respiro {command}", usage="%(prog)s CHECKPOINT [options]", description=_describe(command)
    )
    parser.add_argument("checkpoint", type=str, help="what 'respiro fit' wrote")
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these options")
    parser.add_argument("--output", type=str, help=f"folder of the report (default: report_{side} by the checkpoint)")
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, mps or auto (default)")
    parser.add_argument("--part", type=dict[str, str], default={}, help=_PART)
    parser.add_subclass_arguments(RespiratoryDataModule, "data", required=False, help="default: as in training")
    if argv and not argv[0].startswith("-"):
        recorded = read_checkpoint(argv[0])[RECORD].get("data")
        if recorded and recorded["class_path"].startswith("respiro."):
            parser.set_defaults(data=recorded)
    elif argv and argv[0] not in ("-h", "--help"):
        raise ValueError(f"the checkpoint comes first: respiro {command} CHECKPOINT [options]")
    options = parser.parse_args(argv)
    data = parser.instantiate_classes(options).data
    if data is None:
        raise ValueError(
            "the checkpoint names no data set of respiro; name one: --data ICBHIDataModule --data.root ..."
        )
    model = restore(options.checkpoint, **_build_parts(options.part)).to(_device(options.device))
    output = Path(options.output or Path(options.checkpoint).parent / f"report_{side}")
    print(f"\n{evaluate(model, data, split=side, output_dir=output)}\n\nreport and figures: {output}")


_PART = "a part that respiro did not write and that is built without arguments: NAME=package.module.Class"


def _build_parts(named: dict[str, str]) -> dict[str, Any]:
    return {name: _build_part(name, path) for name, path in named.items()}


def _build_part(name: str, path: str) -> Any:
    try:
        return pkgutil.resolve_name(path)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"part {name}={path} cannot be built: {error}") from error


def _device(name: str) -> str:
    import torch

    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not there: torch finds no GPU; use --device cpu")
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _predict(argv: list[str]) -> None:
    parser = _parser("predict")
    parser.add_argument("checkpoint", help="what 'respiro fit' wrote")
    parser.add_argument("files", nargs="+", metavar="FILE", help="sound files of any length")
    parser.add_argument(
        "--cycles",
        metavar="TXT",
        help="start and end (s) of each cycle, one a line, in the first two columns (ICBHI's annotation form); "
        "without it the file is cut into windows",
    )
    parser.add_argument("--output", metavar="CSV", help="write the table there instead of printing it")
    parser.add_argument("--part", metavar="NAME=CLASS", action="append", default=[], help=_PART)
    options = parser.parse_args(argv)

    import pandas as pd

    from respiro.methods._checkpoint import restore

    cycles = _read_cycles(options.cycles) if options.cycles else None
    model = restore(options.checkpoint, **_build_parts(dict(part.split("=", 1) for part in options.part)))
    result = pd.concat([model.predict(name, cycles).assign(file=name) for name in options.files], ignore_index=True)
    result.insert(0, "file", result.pop("file"))
    if options.output:
        result.to_csv(options.output, index=False)
    else:
        print(result.to_string(index=False, float_format="{:.3f}".format))


def _read_cycles(path: str) -> list[tuple[float, float]]:
    cycles = []
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        fields = line.split()
        try:
            cycles += [(float(fields[0]), float(fields[1]))] if fields else []
        except (ValueError, IndexError):
            raise ValueError(f"{path}, line {number}: expected start and end in seconds, got {line!r}") from None
    return cycles


def _data_parser(command: str) -> argparse.ArgumentParser:
    """Return a parser with a subcommand for each data set."""
    parser = _parser(command)
    kinds = parser.add_subparsers(dest="dataset", required=True, metavar="{icbhi,sprsound}")
    for name in ("icbhi", "sprsound"):
        kind = kinds.add_parser(name)
        kind.add_argument("root", help="its folder")
        kind.add_argument("--partial", action="store_true", help="go on with fewer recordings than published")
        kind.add_argument("--any-encoding", action="store_true", help="accept files that are not mono PCM as published")
        if name == "sprsound":
            kind.add_argument("--year", type=int, default=2022, help="of the release (%(default)s)")
        if command == "data":
            label = {"icbhi": ("--labels", "4-class"), "sprsound": ("--task", "1-1")}[name]
            kind.add_argument(label[0], default=label[1], help="label map (%(default)s)")
            kind.add_argument("--download", action="store_true", help="fetch the official files that are missing")
            kind.add_argument(
                "--no-verify-tls",
                dest="verify_tls",
                action="store_false",
                help="do not check the server's certificate when downloading; the content is checked all the same",
            )
        else:
            if name == "icbhi":
                kind.add_argument("--protocol", default="official", help="how the sides are made (%(default)s)")
            kind.add_argument("--val-fraction", type=float, default=0.15, help="held out of train (%(default)s)")
            kind.add_argument("--seed", type=int, default=0, help="of the split (%(default)s)")
    return parser


def _data(argv: list[str]) -> None:
    options = vars(_data_parser("data").parse_args(argv))

    from respiro.datasets import ICBHI, SPRSound

    kind: Any = {"icbhi": ICBHI, "sprsound": SPRSound}[options.pop("dataset")]
    data = kind(options.pop("root"), split="all", **options)
    data.summary()
    if data.partial:
        print("PARTIAL: not checked against the published counts")
    else:
        data.verify()
        print("every count and digest is as published")


def _audit(argv: list[str]) -> None:
    options = vars(_data_parser("audit").parse_args(argv))

    from respiro.datamodules import ICBHIDataModule, SPRSoundDataModule
    from respiro.splits import audit_leakage

    kind: Any = {"icbhi": ICBHIDataModule, "sprsound": SPRSoundDataModule}[options.pop("dataset")]
    module = kind(options.pop("root"), **options)
    cycles, split = module.data.cycles, module.split
    test = cycles.loc[split.test]
    sides = {"train": cycles.loc[split.train], "validation": cycles.loc[split.val]}
    # SPRSound's two test sides differ in just what an audit looks for.
    drawn = split.name not in ("official", "official-clean")
    sides |= {"test": test} if drawn else {str(name): part for name, part in test.groupby("split", sort=False)}
    for one, other in itertools.combinations(sides, 2):
        if {one, other} <= {"inter", "intra"} or sides[one].empty:
            continue
        print(f"\n== {split.name}: {one} against {other}" + (" *** LEAKY ***" if split.leaky else ""))
        print(audit_leakage(sides[one], sides[other], module.data.all_recordings))
