"""What a person sees while a command works: progress with the time left, and Ctrl-C."""
