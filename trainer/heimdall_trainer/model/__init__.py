"""The localizer: network, losses, metrics."""
