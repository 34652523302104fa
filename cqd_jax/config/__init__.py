"""Settings of an experiment: read, checked, and resolved to objects."""
