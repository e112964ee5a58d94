"""Faster ways to the same result, and settings of the process. Without them: a correct, slower program."""
