"""The prefill node: chunked prefill over paged device KV, and the hand-off."""
