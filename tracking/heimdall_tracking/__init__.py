"""heimdall_tracking."""
