"""One migration on the source: serves a memory image as a QEMU source would."""
