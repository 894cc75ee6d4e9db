"""Studies of the theory, beyond what the paper states."""
