"""Before an upgrade: which defaults change between two versions, why, and what it costs."""
