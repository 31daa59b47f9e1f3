"""Whatever gives an image part labels and a foreground rank, and the shard it writes them to."""
