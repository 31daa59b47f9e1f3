"""Which patches are masked: one file a strategy, the same count in every row."""
