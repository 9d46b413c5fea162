"""Networks on the meta device: building them small, giving them storage and values."""
