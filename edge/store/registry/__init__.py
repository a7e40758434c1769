"""Models in OCI registries: pushed and pulled over the distribution protocol, version 1.1."""
