"""Search and exploration of embedded corpora: neighbours, places in files, duplicates, outliers, clusters, maps."""
