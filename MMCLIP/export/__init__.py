"""MMCLIP for runtimes without torch."""
