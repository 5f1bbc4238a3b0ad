"""The decode node: admission, hot cache, backup, continuous batching."""
