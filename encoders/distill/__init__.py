"""The verb `encoder`: a small ViT from images alone (DINO + iBOT), or from a larger frozen one."""
