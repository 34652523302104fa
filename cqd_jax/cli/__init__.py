"""The console command `cqd`."""
