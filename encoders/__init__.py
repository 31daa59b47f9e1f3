"""Any Vision Transformer, from any file: frozen for the stages, or trained here."""
