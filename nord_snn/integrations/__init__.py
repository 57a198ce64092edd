"""Other libraries: each module here imports the one that it is named after, and nothing else in the package does."""
