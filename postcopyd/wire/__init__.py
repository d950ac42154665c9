"""Sans-IO codecs: bytes in and messages out, and the writers for the same."""
