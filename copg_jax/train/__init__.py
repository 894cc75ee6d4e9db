"""Training: one step, one loop, and the run around them."""
