"""What `heimdall-train` does, a module for each group of commands. What is heavy is imported by the command itself."""
