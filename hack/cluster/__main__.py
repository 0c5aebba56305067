"""`python3 hack/cluster up|down|status|load|env|engine|parts|images`: the local Kubernetes cluster."""

from heimdall_cluster.cli import main

main()
