"""Variation operators on task vectors."""
