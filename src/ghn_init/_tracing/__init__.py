"""A module to a Graph."""
