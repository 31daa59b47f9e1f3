"""Part-labelled images at rest and as a stream. Knows no model."""
