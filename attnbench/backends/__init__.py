"""WHO runs it: `AttentionBackend` names, its metadata builder feeds, its impl runs."""
