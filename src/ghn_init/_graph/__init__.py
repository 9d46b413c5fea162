"""The computational graph and its picture; knows no module and no tensor of a network."""
