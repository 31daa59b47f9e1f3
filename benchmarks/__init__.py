"""What limits a run, one file a resource, each beside a null that isolates it."""
