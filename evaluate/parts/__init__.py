"""Part labels and foreground ranks against truth, shortcuts and themselves."""
