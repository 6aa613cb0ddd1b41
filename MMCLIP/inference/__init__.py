"""Using a saved MMCLIP: loading, and what the command line and the web demo share."""
