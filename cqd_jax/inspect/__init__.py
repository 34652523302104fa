"""`cqd inspect`: experts looked at before they are merged."""
