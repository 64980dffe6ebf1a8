"""The version of the package, read by results and checkpoints."""

__version__ = "0.1.0"
