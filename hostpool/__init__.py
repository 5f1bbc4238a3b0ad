"""Memory that holds KV: pinned host pages, device pages, indexer pages, seats, and who owns them."""
