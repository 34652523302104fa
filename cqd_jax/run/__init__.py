"""The durable loop: score, search, record, checkpoint, resume, compare, report."""
