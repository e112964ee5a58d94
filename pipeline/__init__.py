"""What runs, in which order, and whether it is done."""
