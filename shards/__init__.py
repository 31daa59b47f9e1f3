"""Part-labelled pictures at rest and as a stream. Knows no model."""
