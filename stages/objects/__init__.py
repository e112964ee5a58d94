"""The objects of a bucket: listed, matched, read and verified."""
