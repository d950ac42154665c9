"""The ways to get at the memory of a VMM."""
