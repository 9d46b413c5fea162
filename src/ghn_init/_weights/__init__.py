"""Finding, reading and writing the weights of a hypernetwork."""
