"""From the final graph to a fast module."""
