"""What every training loop repeats: run folder, device, schedule, checkpoint, ranks, metrics. Knows no task."""
