"""The sparse-attention transformer: configuration, weights, layers, sampling, text."""
