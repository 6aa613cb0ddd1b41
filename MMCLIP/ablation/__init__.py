"""Rows that differ in a few keys of one run config, each trained with several seeds and compared seed by seed."""
