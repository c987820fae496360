"""Modular PyTorch Lightning components for respiratory-sound classification.

Importing ``respiro`` itself loads nothing heavy; take what you need from its subpackages::

    from respiro.datamodules import ICBHIDataModule
    from respiro.methods import SoundClassifier
    from respiro.models import CNN6
"""

__version__ = "0.1.0.dev0"
