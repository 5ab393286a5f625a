"""The contrastive captioner: image encoder, pooler, text encoder, text decoder, and the weights that fill them."""
