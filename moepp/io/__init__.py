"""Reading what others may have written, and writing so that nothing is half."""
