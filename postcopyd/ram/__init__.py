"""RAM blocks, the page map, host pages and discard plans: accounting without descriptors."""
