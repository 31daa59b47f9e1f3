"""What `benchmarks/gpu.py` measures in the minutes that a GPU is at hand: a section a file, and what runs them."""
