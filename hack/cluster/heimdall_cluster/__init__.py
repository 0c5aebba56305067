"""A local Kubernetes cluster by kind, everywhere: with Docker and a registry, or with neither."""
