"""Models over folders, lists, videos and buckets: what is listed is predicted, written and remembered."""
