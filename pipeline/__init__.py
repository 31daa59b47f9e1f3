"""The command line, Ray, and the demo: the only package that sees the others."""
