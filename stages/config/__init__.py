"""What a user may write in a config file: one module a stage, types and their checks, no torch, no Ray."""
