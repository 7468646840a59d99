"""Modules:

- `fastswa.cli.commands`: What each command of `fastswa` does: a function with its name, which gets its options, prints what it found, writes its files, and returns what `--json` prints
- `fastswa.cli.recipe`: What the commands train: the convnet of the fast.ai course with BatchNorm, on images of one or more channels in up to ten classes"""

from importlib.metadata import version as _version

__version__ = _version(__name__)
