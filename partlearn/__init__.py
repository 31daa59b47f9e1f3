"""Stage 1: a frozen ViT's tokens become part maps and a foreground rank."""
