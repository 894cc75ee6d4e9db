"""Studies of the theory, beyond what the paper states, and how trained policies are compared."""
