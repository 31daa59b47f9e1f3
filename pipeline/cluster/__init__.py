"""Ray: joining a cluster, actors that build shards, jobs and their uploads."""
