"""Encoder -> numbers, and part maps -> numbers; one protocol a file."""
