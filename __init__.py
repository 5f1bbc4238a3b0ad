"""tidepool: disaggregated prefill/decode serving for models with top-k sparse attention.

The repository's root is this package; docs/architecture.md is the map.
"""
