"""The edge: everything that touches disk, processes, clocks or terminals."""
