"""Faster ways to the same result, and settings of the process.

Networks enter by one call, `accelerate` or `freeze`. Without this package (and with torch's Adam) the program
is correct and slower.
"""
