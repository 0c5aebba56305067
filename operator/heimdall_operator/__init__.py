"""heimdall_operator."""
