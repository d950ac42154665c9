"""One migration on the destination: states, faults, placing, return path."""
