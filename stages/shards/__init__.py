"""The data set: shards in Parquet, how they are read, in which order, and fed to training."""
