"""The command line of training: one run, or a sweep of runs in a process each."""
