"""What lies in a bucket: list it, match it, read it whole and verified."""
