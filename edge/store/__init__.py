"""The model store: an OCI image layout on disk, and the sources that fill it."""
