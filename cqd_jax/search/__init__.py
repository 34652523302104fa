"""The search: emitters and the CycleQD loop."""
