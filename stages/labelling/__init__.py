"""What labels configurations: a run on one process, on several or on a cluster, and the reading of its folder."""
