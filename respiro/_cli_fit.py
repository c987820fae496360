"""``respiro fit``: LightningCLI with recipes by name and pretrained weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import respiro.losses
import respiro.transforms  # noqa: F401  (the classes of both may then be named shortly)
from respiro.datamodules.base import RespiratoryDataModule
from respiro.methods import SoundClassifier
from respiro.methods._checkpoint import read_checkpoint
from respiro.models.weights import Weights, load_weights

RECIPES = Path(__file__).parent / "recipes"


def fit(argv: list[str]) -> None:
    """Train as the options and configs say."""
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # it is how a command is passed on
    FitCLI(
        SoundClassifier,
        RespiratoryDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        # Our checkpoints describe themselves; with this on, Lightning would write its own, other form into them.
        load_from_checkpoint_support=False,
        save_config_kwargs={"overwrite": True},
        args=["fit", *with_recipes(argv)],
    )


def with_recipes(argv: list[str]) -> list[str]:
    """Put the files of recipes in the place of their names.

    Raises:
        ValueError: If a config is neither a file nor a recipe.
    """
    options = ("-c", "--config")
    found = list(argv)
    for place, argument in enumerate(argv):
        option, _, value = argument.partition("=")
        if option in options and value:
            found[place] = f"{option}={_config(value)}"
        elif place and argv[place - 1] in options:
            found[place] = _config(argument)
    return found


def _config(value: str) -> str:
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if ":" in value or Path(value).is_file():  # a config can also be given as text
        return value
    if value not in names:
        raise ValueError(f"config {value!r} is neither a file nor a recipe; recipes: {', '.join(names)}")
    return str(RECIPES / f"{value}.yaml")


class FitCLI(LightningCLI):
    """LightningCLI with one subcommand, labels that follow the data set, and pretrained weights."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Name the only command, and what its options do not set."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the checkpoint, the weights and the defaults."""
        for action in parser._actions:
            # float before int would read limit_train_batches 1, one batch, as 1.0, all of them.
            if getattr(action, "_typehint", None) == float | int | None:
                action._typehint = int | float | None  # type: ignore[attr-defined]
        parser.add_argument(
            "--weights",
            type=str | None,
            default=None,
            help=f"pretrained weights of the backbone: {', '.join(Weights.__members__)}, or a file",
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.monitor": "val_score", "checkpoint.mode": "max", "checkpoint.save_last": True})
        backbone = {"class_path": "respiro.models.CNN6"}
        parser.set_defaults(
            {"model": {"class_path": "respiro.methods.SoundClassifier", "init_args": {"backbone": backbone}}}
        )
        parser.link_arguments("data.classes", "model.init_args.classes", apply_on="instantiate")
        parser.link_arguments("data.scoring", "model.init_args.scoring", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Take the model from the options alone: ours is described otherwise than Lightning would read it."""

    def after_instantiate_classes(self) -> None:
        """Load the weights, and keep the last epoch where there is nothing to select by."""
        if not self.datamodule.val_fraction and self.datamodule.select_on == "val":
            checkpoint: Any = self.trainer.checkpoint_callback
            checkpoint.monitor = None
        resumed = self._get(self.config, "ckpt_path")
        if resumed and resumed not in ("best", "last", "hpc"):
            read_checkpoint(resumed)  # says what is wrong with a file that is not ours
        if weights := self._get(self.config, "weights"):
            skipped = f"weights {weights} not loaded: the training goes on from {resumed}"
            message = skipped if resumed else load_weights(self.model.backbone, weights)
            if self.trainer.is_global_zero:
                print(message)

    def after_fit(self) -> None:
        """Say which checkpoint was chosen, and how to go on."""
        checkpoint: Any = self.trainer.checkpoint_callback
        # Where validation came in no epoch, there is the last checkpoint alone.
        path = checkpoint.best_model_path or checkpoint.last_model_path
        if self.trainer.is_global_zero and path:
            # The score is not known where a training that was already complete is resumed elsewhere.
            score = "" if checkpoint.best_model_score is None else f" {checkpoint.best_model_score:.4f}"
            best = checkpoint.monitor and checkpoint.best_model_path
            chosen = f"best {checkpoint.monitor}{score}" if best else "last"
            stamp = " *** TEST-SELECTED ***" if self.datamodule.select_on == "test" else ""
            print(f"\n{chosen}: {path}{stamp}")
            print(f"to score it on the test side: respiro test {path}")
