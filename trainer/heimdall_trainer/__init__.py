"""heimdall_trainer."""
