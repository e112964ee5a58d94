"""Real servers for tests: an S3 store, an HTTP file server, and a proxy that puts faults between."""
