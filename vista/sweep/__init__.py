"""Training over several seeds and settings, resumable, with a table of the results."""
