"""The Linux ABI that post-copy stands on: one file per kernel object, no policy."""
