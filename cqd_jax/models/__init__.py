"""The decoder-only transformer and its decoding, as plain functions on nested params dicts."""
