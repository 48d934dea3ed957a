"""What a run leaves behind: its directory, lock, environment and report."""
