"""The ops of the hot path, one a file: a torch reference on the CPU; CUDA registers beside it."""
