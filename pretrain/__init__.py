"""Stage 2: labelled shards become an encoder, by a masked autoencoder whose masks know the parts."""
