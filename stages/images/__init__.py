"""Images as arrays: decode, resize, encode, derive, augment."""
