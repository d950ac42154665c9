"""The commands: postcopyd and postcopyctl."""
