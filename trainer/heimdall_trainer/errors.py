"""Errors that end a training with a meaning of their own."""

from __future__ import annotations


class ConfigurationError(Exception):
    """The spec can't work; the message names the field and the remedy. Not tried again."""


class DataError(Exception):
    """The recordings can't be trained on; the message names them and the remedy."""


class DeviceError(Exception):
    """The GPU that is there can't be used."""


class DivergedError(Exception):
    """What is monitored is no number, and there are no weights of which it was one."""


class FencedError(Exception):
    """A newer attempt has taken over: nothing more is published."""


class UndeliveredError(Exception):
    """Training ended, but its results could not be delivered to MLflow in time."""


class ExportError(ConfigurationError):
    """A model can't be given out as ONNX, or would not be what it was; the message says why."""
