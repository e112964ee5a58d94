"""How well generated images match their targets."""
