"""Models as files: saved, imported, exported."""
