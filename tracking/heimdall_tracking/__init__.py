"""Everything Heimdall says to MLflow; a library of its own."""

from heimdall_tracking.errors import TrackingError
from heimdall_tracking.settings import SettingsError, TrackingSettings, load_settings
from heimdall_tracking.tracker import MLflowTracker, initialize_mlflow

__all__ = ["MLflowTracker", "SettingsError", "TrackingError", "TrackingSettings", "initialize_mlflow", "load_settings"]
